"""Reads a config from its file and from fields on the command line."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from runs import load_config
from user_files import forgetful as forgetful
from user_files import write

import dit_jax
from dit_jax import config_file, recipes, registry
from dit_jax.build import Run
from dit_jax.config_file import read
from dit_jax.errors import UserError
from dit_jax.runtime import user_code
from dit_jax.runtime.command_line import config_fields
from dit_jax.runtime.field_values import FieldType

DIGITS = str(ROOT / "configs" / "digits.py")
pytestmark = pytest.mark.usefixtures("forgetful")


def section(c, name):
    return c[name].to_dict()


@pytest.mark.parametrize("name", ["digits", "xl2_imagenet256", "folder_latent", "vae_digits"])
def test_a_file_alone_is_what_it_returns(name):
    """Fields that are lost, added or changed on the way."""
    c = read(str(ROOT / "configs" / f"{name}.py"))
    assert c.to_dict() == load_config(name).to_dict() and c.is_locked


def test_fields_in_any_order():
    """A field that is only set behind the name, or behind --config; a value of another type."""
    fields = ["process.shift=3", "process.name=flow", "batch_size=1e3", "optimizer.decay_steps=None", "mesh.zero1"]
    c = read(DIGITS, fields)
    assert c == read(DIGITS, fields[::-1])
    assert section(c, "process") == recipes.flow() | {"shift": 3.0}
    assert (c.batch_size, c.optimizer.decay_steps, c.mesh.zero1) == (1000, None, True)
    assert read(DIGITS, ["seed=1", "seed=2"]).seed == 2


def test_a_name_remakes_its_section():
    """An override that is refused for fields that nobody typed, or that keeps what belonged to another constructor."""
    c = read(DIGITS, ["sampler.name=heun", "process.name=flow", "scoring.sampler.name=ddim", "scoring.sampler.num_steps=7"])
    assert section(c, "sampler") == {"name": "heun", "num_steps": 25}
    assert section(c, "process") == section(load_config("digits", "process=flow"), "process")
    assert c.scoring.sampler.to_dict() == {"name": "ddim", "num_steps": 7, "eta": 0.0, "spacing": "even"}
    same = read(DIGITS, ["optimizer.name=adamw", "process.name=gaussian"])
    assert same == read(DIGITS)  # nothing is remade where the name is the file's own


def test_a_codec_of_weights():
    """A codec that is asked for by name and has no field for its weights, or a scale that is not theirs."""
    c = read(DIGITS, ["codec.name=kl_vae", "codec.path=/vae", "codec.block_out_channels=8,16"])
    assert c.codec.path == "/vae" and c.codec.sha256 == "" and c.codec.scale is None and c.codec.block_out_channels == (8, 16)
    assert read(DIGITS, ["codec.name=kl_vae", "codec.scale=0.5,0.25"]).codec.scale == (0.5, 0.25)
    assert "path" not in read(str(ROOT / "configs" / "digits_latent.py"), ["codec.name=pixels", "codec.image_channels=1"]).codec


def test_the_loader_goes_with_the_data():
    """A latent cache that is read by the threads of a loader for photographs, or refused for their number."""
    c = read(DIGITS, ["data.name=latents", "data.path=/cache", "loader.resident=true"])
    assert section(c, "data") == {"name": "latents", "path": "/cache", "verify": True} and section(c, "loader") == {
        "resident": True,
        "retry_seconds": 300.0,
    }
    back = read(str(ROOT / "configs" / "folder_latent.py"), ["data.name=folder"])
    assert section(back, "loader") == recipes.loader() and back.data.path == ""
    assert read(DIGITS, ["data.name=folder", "data.path=/x"]).loader.num_threads == 2  # the same loader: as the file has it
    with pytest.raises(UserError, match="loader has no field num_threads; there are resident, retry_seconds"):
        read(DIGITS, ["data.name=latents", "loader.num_threads=3"])


def test_every_field_of_a_constructor_can_be_given():
    """A field that has a default and is in no config file, and so can only be changed by editing one."""
    c = read(str(ROOT / "configs" / "xl2_imagenet256.py"), ["codec.norm_groups=16", "data.image_key=picture"])
    assert c.codec.norm_groups == 16 and c.data.image_key == "picture"


EXAMPLES = {int: "3", float: "0.5", str: "x", bool: "true", tuple: "(1.0,2.0,3.0,4.0)", type(None): "None"}


def unions(parameters):
    """(field, a type that it may have), of the fields that may have several."""
    types = {field: FieldType.of_annotation(p.annotation).allowed for field, p in parameters.items()}
    return [(field, kind) for field, kinds in types.items() if len(kinds) > 1 for kind in kinds]


def takes(file, path, kind, *fields):
    """Whether a field of a config takes a value of this type."""
    section: object = read(file, [*fields, f"{path}={EXAMPLES[kind]}"])
    for name in path.split("."):
        section = section[name]
    return type(section) is kind


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_every_type_of_a_field_can_be_given(name):
    """None for what a recipe has set, or a number for each channel: refused, because the file's value has another type."""
    file, config = str(ROOT / "configs" / f"{name}.py"), load_config(name)
    found = [
        (f"{kind}.{field}", type_)
        for kind in registry.SECTIONS
        if "name" in config.get(kind, {})
        for field, type_ in unions(registry.parameters(kind, config[kind].name))
    ]
    for place in (*config_file.CONSTRUCTORS, "loader"):
        section, _, part = place.partition(".")
        if section in config and (not part or part in config[section]):
            parameters = inspect.signature(config_file.unnamed_constructor(config, place), eval_str=True).parameters
            known = config[section][part] if part else config[section]
            found += [(f"{place}.{field}", type_) for field, type_ in unions(parameters) if field in known]
    assert ("optimizer.clip_norm", type(None)) in found and ("checkpoint.keep_every_steps", type(None)) in found
    assert [field for field in found if not takes(file, *field)] == []


def test_every_type_of_a_field_of_every_constructor():
    """A constructor that no config names, with an optional field that cannot be set back to None."""
    wrong = []
    for kind in ("model", "process", "codec", "data", "transform", "optimizer", "sampler", "guidance", "conditioner"):
        for name in registry.names(kind):
            parameters = registry.parameters(kind, name)
            required = {
                field: FieldType.of_annotation(p.annotation).allowed for field, p in parameters.items() if p.default is p.empty
            }
            fields = [f"{kind}.name={name}", *(f"{kind}.{field}={EXAMPLES[types[0]]}" for field, types in required.items())]
            wrong += [
                (kind, name, field) for field in unions(parameters) if not takes(DIGITS, f"{kind}.{field[0]}", field[1], *fields)
            ]
    assert wrong == []


@pytest.mark.parametrize(
    "fields, text",
    [
        (
            ["process.name=flow", "process.num_timesteps=9"],
            "process 'flow' has no field num_timesteps; there are convention, interpolant",
        ),
        (["process.name=steam"], "process 'steam' is not registered; choose one of edm, flow, gaussian"),
        (["data.name=tfds"], r"data set 'tfds' needs dataset, split; add --config\.data\.dataset=\.\.\. --config\.data\.split"),
        (["batchsize=3"], "did you mean batch_size"),
        (["learning_rate=3"], r"did you mean --config\.optimizer\.learning_rate\?"),
        (["optimizer.lr=3"], r"optimizer 'adamw' has no field lr; did you mean learning_rate\? There are b1, b2"),
        (["=3"], "the name of a field is missing"),
        (["codec.mean=nan"], "mean must be a number"),
        (["transform.size=(8, 8"], "size must be a tuple"),
        (["optimizer={'learning_rate': 1}"], r"a section; give its fields one by one, as in --config\.optimizer\.learning_rate="),
        (["model.wid=3"], r"network 'dit' has no field wid; did you mean width\?.*conditioning, depth"),
        (["modl.width=3"], "no section modl; did you mean model"),
        (["seed.x=3"], "no section seed"),
        (["model=3"], r"model is a section; give its fields one by one, as in --config\.model\.attention="),
        (["process=flow"], "process is a section"),
        (["batch_size=many"], "--config.batch_size=many: batch_size must be a whole number"),
        (["batch_size=None"], "batch_size must be a whole number"),
        (["batch_size=2.5"], "batch_size must be a whole number"),
        (["batch_size"], "batch_size has no value"),
        (["optimizer.clip_norm=x"], "clip_norm must be a number or None"),
        (["task.name=autoencoder"], "give a config file of task 'autoencoder'"),
    ],
)
def test_mistakes(fields, text):
    """A slip that is ignored, or answered without what would help."""
    with pytest.raises(UserError, match=text):
        read(DIGITS, fields)


def test_older_names_of_fields(tmp_path):
    """A script or a config file of an older version that is refused, or has no effect."""
    assert read(DIGITS, ["task.label_dropout=0.3"]).task.cond_dropout == 0.3
    old = write(
        tmp_path / "old.py",
        """
        from dit_jax import recipes
        def get_config():
            c = recipes.digits()
            c.task.label_dropout = 0.25
            return c
        """,
    )
    assert read(str(old)).task.cond_dropout == 0.25


def test_fields_that_follow_others(tmp_path):
    """A field that a config file ties to another one and that stays behind."""
    file = write(
        tmp_path / "tied.py",
        """
        from dit_jax import recipes
        def get_config():
            c = recipes.digits()
            c.optimizer.decay_steps = c.get_ref("num_steps")
            return c.lock()
        """,
    )
    assert read(str(file), ["num_steps=70"]).optimizer.decay_steps == 70


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "def get_config():\n    from dit_jax import recipes\n    return recipes.digits().lock().nothing\n",
            "c.py, line 3: AttributeErr",
        ),
        ("def get_config(:\n", "c.py, line 1: SyntaxError"),
        ("x = 1\n", "has no get_config"),
        ("def get_config():\n    return {}\n", "returns a dict"),
        ("\ndef get_config():\n    pass\n", r"c\.py, line 2: get_config\(\) returns None; it has no return statement"),
        ("import sys\nsys.exit(3)\n", "c.py, line 2: SystemExit: 3"),
        (
            "from dit_jax import recipes as r\ndef get_config():\n    c = r.digits().lock()\n    c.model.widht = 3\n",
            'c.py, line 4: AttributeError: Key "widht" does not exist .*locked. Did you mean "width" instead of "widht"',
        ),
        ("def get_config(size):\n    return {}\n", "needs an argument; write --config=.*:<argument>"),
        ("from dit_jax import recipes\ndef get_config():\n    return recipes.digits('vp')\n", "process 'vp' does not exist"),
    ],
)
def test_failing_files(tmp_path, text, said):
    """Forty frames of a stack, or a whole config, for one wrong line of the user's file."""
    with pytest.raises(UserError, match=said) as caught:
        read(str(write(tmp_path / "c.py", text)))
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 500


def test_failing_constructor_of_a_file(tmp_path):
    """Fifty frames for a wrong line in a class that the user's file registers, because it fails only when it is built."""
    text = """
        import dit_jax
        from dit_jax import recipes
        class Mine:
            def __init__(self, num_steps=3):
                self.num_steps = nothing
        dit_jax.register("sampler", "mine", Mine)
        def get_config():
            return recipes.digits()
        """
    config = read(str(write(tmp_path / "c.py", text)), ["sampler.name=mine"])
    with pytest.raises(
        UserError, match=r"c\.py, line 6: NameError: name 'nothing' is not defined\n    self\.num_steps = nothing$"
    ):
        Run(config).sampler


def test_configs_by_name(tmp_path, monkeypatch):
    """An installed config that needs its path; one of ./configs that the installed one hides; a path that a name hides."""
    monkeypatch.chdir(tmp_path)
    installed, here = tmp_path / "site" / "dit_jax_configs", tmp_path / "configs"
    (installed / "sweeps").mkdir(parents=True)
    here.mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "dit_jax_configs", raising=False)
    source = "from dit_jax import recipes\ndef get_config(arg=''):\n    c = recipes.digits()\n    c.seed = {}\n    return c\n"
    for file, seed in ((installed / "one.py", 1), (installed / "two.py", 2), (here / "two.py", 3), (here / "imagenet.py", 4)):
        file.write_text(source.format(seed))
    (installed / "sweeps" / "grid.py").touch()
    (installed / "__init__.py").touch()  # found before the package of an editable install
    assert [read(name).seed for name in ("one", "two", "imagenet:B/4,256", str(installed / "two.py"))] == [1, 3, 4, 2]
    assert config_file.find("grid", "sweep", "sweeps") == installed / "sweeps" / "grid.py"
    assert list(config_file.known()) == ["imagenet", "one", "two"]
    (tmp_path / "one").write_text("")
    assert config_file.find("one") == Path("one")
    with pytest.raises(
        UserError, match=r"no tow\.py in \./configs or .*dit_jax_configs; did you mean two\? There are imagenet, one"
    ):
        read("tow")
    with pytest.raises(UserError, match=r"--sweep=gird does not exist.*there are grid|did you mean grid"):
        config_file.find("gird", "sweep", "sweeps")
    with pytest.raises(
        UserError, match=r"--config=configs/one\.py does not exist; .* has two\.py, imagenet\.py; --config=one exists"
    ):
        read("configs/one.py")
    with pytest.raises(UserError, match="--config has no value"):
        read("")


def test_missing_files(tmp_path, monkeypatch):
    """A name that is mistyped, and a message that does not say what there is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--config=configs/x\.py does not exist; the folder configs does not exist in"):
        read("configs/x.py")
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match=r"the folder configs has no \*\.py"):
        read("configs/x.py")
    for name in ("atoms", "digits"):
        (tmp_path / "configs" / f"{name}.py").touch()
    with pytest.raises(UserError, match=r"the folder configs has digits\.py, atoms\.py$"):
        read("configs/digts.py:process=flow")
    with pytest.raises(UserError, match="takes no argument; leave out :x"):
        read(str(write(tmp_path / "c.py", "def get_config(): pass")) + ":x")


USER_CONFIG = """
from dataclasses import dataclass
import dit_jax
from dit_jax import recipes

@dataclass(frozen=True)
class Leap:
    size: float
    num_steps: int = 3
    floor: float | None = None
    widths: tuple[int, ...] = (1, 2)

dit_jax.register("sampler", "leap", Leap)

def get_config(arg=""):
    c = recipes.digits()
    if arg:
        c.sampler = {"name": arg, "size": 1.0, "num_steps": 5}
    return c
"""


def test_a_constructor_of_the_user(tmp_path):
    """Fields of user code that no flag can set, or that come in another type."""
    file = str(write(tmp_path / "mine.py", USER_CONFIG))
    with pytest.raises(UserError, match=r"sampler 'leap' needs size; add --config\.sampler\.size=\.\.\."):
        read(file, ["sampler.name=leap"])
    c = read(file, ["sampler.name=leap", "sampler.size=2", "sampler.widths=3,4"])
    assert section(c, "sampler") == {"name": "leap", "size": 2.0, "num_steps": 3, "floor": None, "widths": (3, 4)}
    assert read(file, ["sampler.name=leap", "sampler.size=2", "sampler.floor=0.5"]).sampler.floor == 0.5
    assert read(f"{file}:leap", ["sampler.floor=0.5", "sampler.size=3"]).sampler.to_dict() == {
        "name": "leap",
        "size": 3.0,
        "num_steps": 5,
        "floor": 0.5,
    }


def test_imports_are_recorded(tmp_path):
    """A run whose config.json does not say whose code it ran; or one that names a file of which it used nothing."""
    file = write(tmp_path / "mine.py", USER_CONFIG)
    assert "imports" not in read(str(file))
    (entry,) = read(f"{file}:leap").imports
    assert entry == {"name": str(file), "sha256": user_code.file_sha256(file), "registers": ["sampler.leap"]}
    other = write(tmp_path / "other.py", "import dit_jax\ndit_jax.register('metric', 'mine', object)\n")
    user_code.import_all([str(other)])
    assert [entry["name"] for entry in read(f"{file}:leap").imports] == [str(other), str(file)]
    assert [entry["name"] for entry in read(DIGITS, ["evaluation.features=mine"]).imports] == [str(other)]
    user_code.expect(read(f"{file}:leap").imports)
    registry._ENTRIES["sampler"].pop("leap")
    with pytest.raises(UserError, match=r"sampler 'leap' is not registered; add --import=.*mine\.py"):
        registry.get("sampler", "leap")


@pytest.mark.parametrize(
    "given, found",
    [
        (["--config.a.b=1", "--config=x.py"], ["--config.<field>=a.b=1", "--config=x.py"]),
        (["--config.a", "-1", "--list"], ["--config.<field>=a=-1", "--list"]),
        (["--config.a", "--list"], ["--config.<field>=a", "--list"]),
        (["-config.a=b=c"], ["--config.<field>=a=b=c"]),
        (["--noconfig.a.b", "word"], ["--config.<field>=a.b=false", "word"]),
        (["--config", "x.py", "--", "--config.a=1"], ["--config", "x.py", "--", "--config.a=1"]),
    ],
)
def test_forms_of_a_flag(given, found):
    """A form of a flag that worked and is refused, or that takes its neighbour for a value."""
    assert config_fields(["main", *given]) == ["main", *found]


@pytest.mark.slow
def test_modules_define_no_flags():
    """Two subpackages that cannot be imported in one process, because both define a flag."""
    code = """
import importlib, pathlib, pkgutil, traceback
from absl import flags
import dit_jax

define, ours = flags.FlagValues.__setitem__, []

def watch(values, name, flag):
    definer = next(f.filename for f in reversed(traceback.extract_stack()[:-1]) if "/absl/flags/" not in f.filename)
    if pathlib.Path(definer).is_relative_to(pathlib.Path(dit_jax.__file__).parent):
        ours.append(name)
    define(values, name, flag)

flags.FlagValues.__setitem__ = watch
for module in pkgutil.walk_packages(dit_jax.__path__, "dit_jax."):
    if not module.name.endswith(("__main__", "dit_jax.main")):
        importlib.import_module(module.name)
print(ours)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_new_sections_are_complete():
    """A section that is made for a name and lacks a field of its constructor."""
    dit_jax.register("optimizer", "bare", lambda rate: rate)
    assert config_file.new_section("optimizer", "bare") == {"name": "bare"}
    for kind in ("process", "sampler", "guidance", "optimizer", "codec"):
        for name in registry.names(kind):
            if name != "bare":
                assert set(registry.parameters(kind, name)) <= set(config_file.new_section(kind, name)), name
