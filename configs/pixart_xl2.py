from dit_jax import recipes


def get_config():
    return recipes.pixart(256, cached=True)
