from dit_jax import recipes


def get_config():
    return recipes.sd3("SD3-medium@1024", cached=True)
