"""Computes the cost of models, and plans runs on devices that this machine need not have.

    python -m dit_jax.plan --models
    python -m dit_jax.plan --config=xl2_imagenet256 --topology=v5p:4x4x4 --config.mesh.fsdp=64
    python -m dit_jax.plan --config=xl2_imagenet256 --topology=v5e:4x4 --search --search_batch_sizes=256,512
    python -m dit_jax.plan --config=xl2_imagenet256 --topology=h200:1 --config.data.name=latents --traffic
    python -m dit_jax.plan --table=v5e:4x4,v5p:4x4x4,v6e:4x4

--models prints the paper's twelve sizes at 256 and 512 pixels, and the other conditioning blocks of XL/2: tokens, parameters,
GMACs (multiply-adds of one forward pass of one image, which the paper calls Gflops), and FLOPs of training on one image.

--config compiles the config's training step and sampler ahead of time for a TPU slice (pip install 'dit_jax[plan]'), for GPUs
(h200:8), for simulated devices (cpu:8), or, without --topology, for the devices of this machine. It reports the memory of a
device by kind, whether the run fits, compute and communication, and an estimated step time. It reads no weights and no data: with
--config.data.name=latents the step starts from a latent cache, otherwise with the codec's encoder if there is one.
"""

from absl import flags

from dit_jax import config_file
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console
from dit_jax.runtime.field_values import whole_number

command_line.group("A run")
CONFIG = config_file.define_flags("Config of the run to plan, as for dit_jax.main: a name or a file.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:4x4, h200:8, cpu:8; those of this machine if not given."
)
SAMPLER = flags.DEFINE_bool("sampler", True, "Also compile the draw of one batch of samples.")
TRAFFIC = flags.DEFINE_bool(
    "traffic",
    False,
    "Also list the kernels of the training step and the bytes that they move in HBM, by kind and by module of the network.",
)
RESIDENT_ROWS = flags.DEFINE_integer(
    "resident_rows", 0, "Rows of the latent cache that loader.resident keeps on the devices.", lower_bound=0
)
command_line.group("Search for the fastest settings")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies, batch sizes and microbatches; rank them by images/s.")
BATCH_SIZES = flags.DEFINE_list("search_batch_sizes", [], "Global batch sizes to try; the config's if empty.")
MICROBATCHES = flags.DEFINE_list("search_microbatches", [], "Numbers of microbatches to try; the config's if empty.")
REMATS = flags.DEFINE_list("search_remats", [], "Policies to try, of none, full, dots, elementwise and offload; all if empty.")
MAX_COMPILES = flags.DEFINE_integer("search_max_compiles", 24, "Compile at most so many, of those that may fit.")
command_line.group("Tables")
MODELS = flags.DEFINE_bool("models", False, "The table of published networks: parameters, multiply-adds, FIDs.")
TABLE = flags.DEFINE_list(
    "table",
    [],
    "Topologies: a Markdown table of the twelve sizes on each, 256 px, latent cache, with the "
    "first of data, fsdp, and fsdp with remat=full that fits.",
)
SIZES = flags.DEFINE_list("table_sizes", [], "Models of the table, as in S/2,XL/2; all twelve if empty.")
TABLE_BATCH = flags.DEFINE_integer("table_batch_size", 256, "Global batch size of the table.")


RUN = {"config", command_line.CONFIG_FIELD, "topology", "resident_rows"}
USES = {
    "--models": {"models"},
    "--table": {"table", "table_sizes", "table_batch_size"},
    "--search": {*RUN, "search", "search_batch_sizes", "search_microbatches", "search_remats", "search_max_compiles"},
    "no --search": {*RUN, "sampler", "traffic"},
}


def check_flags() -> None:
    """Raises a UserError if nothing is chosen, or for a flag without effect."""
    if not (MODELS.value or TABLE.value or CONFIG.given):
        raise UserError(
            "choose what to plan: --models prints the table of models, --config=<name or file> with "
            "--topology=v5p:4x4x4 plans a run"
        )
    chosen = "--models" if MODELS.value else "--table" if TABLE.value else "--search" if SEARCH.value else "no --search"
    command_line.check_uses(USES, chosen)


def print_models() -> dict:
    from dit_jax.plan import published

    table = published.table()
    for line in published.lines(table):
        console.say(line)
    return {"models": table}


def whole_numbers(name: str, texts: list[str]) -> list[int]:
    try:
        numbers = [whole_number(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != len(texts) or any(number < 1 for number in numbers):
        raise UserError(f"--{name}={','.join(texts)} must be positive integers separated by commas")
    return numbers


def print_plan(config, topology) -> dict:
    from dit_jax.plan import estimate, text

    if SAMPLER.value:
        estimate.check_sampling(estimate.run_on(config, topology))
    console.say(f"compiling the training step for {topology.name}")
    plan = estimate.plan_training(config, topology, RESIDENT_ROWS.value, TRAFFIC.value)
    for line in (
        *text.training(plan),
        *text.buckets(plan),
        *(text.traffic(plan["traffic"], topology.chip) if TRAFFIC.value else ()),
    ):
        console.say(line)
    plan["sampler"] = estimate.plan_sampling(config, topology) if SAMPLER.value else None
    if plan["sampler"]:
        console.say(text.sampling(plan["sampler"]))
    return plan


def print_search(config, topology) -> dict:
    from dit_jax.build import Run
    from dit_jax.models.network import remat_policies
    from dit_jax.plan import search, text

    known = (remat_policies(Run(config).network) if "model" in config else ()) or ("none",)
    remats = REMATS.value or list(known)
    if unknown := set(remats) - set(known):
        raise UserError(f"--search_remats={','.join(remats)}: unknown policy {', '.join(unknown)}; known are {', '.join(known)}")
    if MAX_COMPILES.value < 1:
        raise UserError(f"--search_max_compiles={MAX_COMPILES.value} must be at least 1")
    result = search.search(
        config,
        topology,
        remats,
        whole_numbers("search_batch_sizes", BATCH_SIZES.value) or [config.batch_size],
        whole_numbers("search_microbatches", MICROBATCHES.value) or [config.microbatches],
        MAX_COMPILES.value,
        console.say,
        RESIDENT_ROWS.value,
    )
    for line in text.markdown(
        text.row(f"batch {plan['batch_size']} / {plan['microbatches']}", plan) for plan in result["ranked"]
    ):
        console.say(line)
    if not result["ranked"]:
        console.say("no choice fits: try a larger slice, more --search_microbatches, or a smaller batch")
    return result


def print_table() -> dict:
    from dit_jax import recipes
    from dit_jax.plan import table, text
    from dit_jax.programs import topology

    places = [topology.find(name) for name in TABLE.value]
    configs = {size: table.config(size, TABLE_BATCH.value) for size in SIZES.value or recipes.MODELS}
    plans = {}
    for place in places:
        for size, config in configs.items():
            plans[f"{size} {place.name}"] = plan = table.simplest_that_fits(config, place)
            console.say(" | ".join(text.row(size, plan)))
    for line in text.markdown(text.row(name.split()[0], plan) for name, plan in plans.items()):
        console.say(line)
    return {"plans": plans}


def main() -> dict:
    check_flags()
    if MODELS.value:
        return print_models()
    if TABLE.value:
        return print_table()
    config = CONFIG.read()
    if RESIDENT_ROWS.value and not config.loader.get("resident"):
        raise UserError(f"--resident_rows={RESIDENT_ROWS.value} has no effect without --config.loader.resident=true; omit it")
    from dit_jax.programs import topology

    place = topology.find(TOPOLOGY.value)
    return (print_search if SEARCH.value else print_plan)(config, place)


if __name__ == "__main__":
    console.run(main)
