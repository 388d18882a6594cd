"""The training step and the sampling of a diffusion model, as pure functions of arrays.

B batch, H x W x C images, h x w x c latents.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.codecs.codec import Codec, moments_shape
from dit_jax.diffusion import guidance as guiding
from dit_jax.diffusion.forecast import Forecast, ForecastingDenoise
from dit_jax.diffusion.process import Denoise, Memoryless, Process, Watched, noise_like
from dit_jax.diffusion.samplers.late import can_start, start_time
from dit_jax.encoders.conditioner import Conditioner, Requests, constants_of
from dit_jax.errors import UserError
from dit_jax.models import network as networks
from dit_jax.models.network import Cond, Network
from dit_jax.parallel.rules import Rules
from dit_jax.pixels import to_float, to_uint8
from dit_jax.tasks.adaptation import BASE, Adaptation
from dit_jax.tasks.averages import Average, Exponential, moving_average, updated
from dit_jax.tasks.state import TrainState, check_offload, count_parameters, new_state, without_constants
from dit_jax.tasks.task import accumulate, is_finite_update, mean_of, named_key, only_if, step_sums

TIME_BUCKETS = 4
CONDITIONER = (
    "conditioner"  # key of a trained conditioner in the parameters, next to the network's keys; of a frozen one in constants
)
NEGATIVE = "negative_"  # begins the names of requests that replace the null condition


class Skips(NamedTuple):
    """Of skip-layer guidance: the network's control without the blocks, and the times between which it acts."""

    control: dict[str, np.ndarray]
    times: tuple[float, float]


@dataclass(frozen=True)
class DiffusionTask:
    """Trains a network to reverse a diffusion process on a codec's latents.

    constants: {"codec": the codec's frozen parameters}, {"conditioner": those of a frozen encoder} if there is one, {"base": the
        network's frozen parameters} if there are some, and {"moments": [N, h, w, 2c]} if the data set is kept on the devices.
    batch: the entries that the conditioner reads (`batch_spec`; {"label": int32[B]}), and one of {"image": uint8[B, H, W, C]},
        {"moments": [B, h, w, 2c]} of a latent cache, and {"row": int32[B]}, rows of constants["moments"].

    Fields:
        image_shape, latent_shape: (H, W, C) and (h, w, c), or (F, H, W, C) and (f, h, w, c).
        cond_dropout: rate at which the condition of an example becomes the null condition.
        ema_decay, ema_warmup: of the moving average that is sampled, see `averages.Exponential`.
        averages: further moving averages.
        adaptation: says which parameters are trained.
        microbatches: number of parts of the batch, computed in sequence, over which gradients are averaged.
        zero1, offload: see `state.abstract_state`.

    Raises:
        UserError: a rate or number out of range.
    """

    network: Network
    process: Process
    codec: Codec
    conditioner: Conditioner
    optimizer: optax.GradientTransformation
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    cond_dropout: float = 0.1
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    averages: tuple[Average, ...] = ()
    adaptation: Adaptation = field(default_factory=Adaptation)
    microbatches: int = 1
    zero1: bool = False
    offload: str = "none"

    name = "diffusion"
    draws_samples = True
    has_auxiliary_networks = False

    def __post_init__(self):
        if not 0 <= self.cond_dropout < 1:
            raise UserError(f"task.cond_dropout is {self.cond_dropout}; it must lie in [0, 1)")
        if self.conditioner.num_classes and self.cond_dropout and not networks.has_null_label(self.network):
            raise UserError(
                f"task.cond_dropout is {self.cond_dropout}, and the network has no null label, which replaces a dropped one; "
                "set --config.task.cond_dropout=0, or --config.model.null_label=True"
            )
        check_offload(self.offload)
        if self.average in self.averages:
            raise UserError(f"averages has {self.average.name}, which is ema_decay, the average that every run has; leave it out")

    @property
    def average(self) -> Exponential:
        """The moving average that is sampled by default."""
        return Exponential(self.ema_decay, self.ema_warmup)

    @property
    def rules(self) -> Rules:
        return self.network.rules + self.conditioner.rules + (self.adaptation.rules if self.adaptation.lora.rank else ())

    @property
    def has_null_condition(self) -> bool:
        """Whether the network is trained on the null condition, which classifier-free guidance needs."""
        return bool(self.conditioner.cond_spec()) and self.cond_dropout > 0

    def init(self, key: jax.Array) -> TrainState:
        return self.state_of(self.init_params(key), key)

    def state_of(self, params: Any, key: jax.Array) -> TrainState:
        """The state at the start of training, from the network's parameters; key is for new adapters."""
        if self.adaptation.active:
            params = self.adaptation.trained(params, key)
        return new_state(params, self.optimizer, self.averages)

    def init_params(self, key: jax.Array) -> Any:
        """Random parameters of the network, and of the conditioner if it is trained."""
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,))
        cond = {name: jnp.zeros((1, *x.shape), x.dtype) for name, x in self.conditioner.cond_spec().items()}
        params = self.network.init(key, x, t, cond)["params"]
        if encoder := self.conditioner.init(named_key(key, CONDITIONER)):
            params = {**params, CONDITIONER: encoder}
        return params

    def network_params(self, params: Any, constants: Mapping[str, Any]) -> Any:
        """The network's parameters, of trained ones (or an average of them) and the frozen ones in the constants."""
        rules = self.network.rules + self.conditioner.rules
        return self.adaptation.merged(params, constants[BASE], rules) if self.adaptation.active else params

    def init_optimizer(self, params: Any) -> Any:
        return self.optimizer.init(params)

    def batch_spec(self, entry: str = "image") -> dict[str, jax.ShapeDtypeStruct]:
        entries = {
            "image": jax.ShapeDtypeStruct(self.image_shape, jnp.uint8),
            "moments": jax.ShapeDtypeStruct(moments_shape(self.codec, self.latent_shape), jnp.float16),
            "row": jax.ShapeDtypeStruct((), jnp.int32),
        }
        return {"label": jax.ShapeDtypeStruct((), jnp.int32), **self.conditioner.batch_spec(), entry: entries[entry]}

    def constants(self) -> dict[str, Any]:
        frozen = {"codec": jax.eval_shape(self.codec.init, jax.random.key(0))}
        if encoders := constants_of(self.conditioner)[0]:
            frozen[CONDITIONER] = encoders
        if self.adaptation.active:
            frozen[BASE] = self.adaptation.base(jax.eval_shape(self.init_params, jax.random.key(0)))
        return frozen

    def constant_rules(self) -> dict[str, Rules]:
        rules = {"codec": self.codec.rules, CONDITIONER: constants_of(self.conditioner)[1]}
        return rules | ({BASE: self.network.rules + self.conditioner.rules} if self.adaptation.active else {})

    def macs(self) -> int:
        cond_shapes = {name: x.shape for name, x in self.conditioner.cond_spec().items()}
        return self.network.macs(self.latent_shape, cond_shapes)

    @property
    def remat(self) -> str | None:
        return getattr(self.network, "remat", None)

    def activation_bytes(self, rows: int, mesh_shape: Mapping[str, int]) -> int:
        return networks.activation_bytes(self.network, self.latent_shape, rows, mesh_shape)

    def savings(self, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        return networks.savings(self.network, self.latent_shape, rows, mesh_shape, activations)

    def requests(self, given: Mapping[str, Any]) -> Requests:
        """The entries of a batch for requests of samples, as `Conditioner.from_requests` returns them.

        Raises:
            UserError: as there; or the null label is asked for, and the network is not trained on it.
        """
        requests, classes = self.conditioner.from_requests(dict(given)), self.conditioner.num_classes
        if classes and not self.has_null_condition and (requests.get("label", np.zeros(0)) == classes).any():
            raise UserError(
                f"the network was never trained without its label (task.cond_dropout is {self.cond_dropout}) and cannot draw "
                f"without one; ask for labels from 0 to {classes - 1}"
            )
        return requests

    def condition(self, params: Any, constants: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> tuple[Cond, Cond]:
        """(condition, null condition) for a batch or for requests; a negative prompt of requests replaces the null condition."""
        params, constants = params.get(CONDITIONER, {}), constants.get(CONDITIONER, {})
        cond = self.conditioner.from_batch(params, constants, batch)
        if negative := {name.removeprefix(NEGATIVE): x for name, x in batch.items() if name.startswith(NEGATIVE)}:
            return cond, self.conditioner.from_batch(params, constants, negative)
        return cond, self.conditioner.null(params, constants, cond)

    def apply(self, params: Any, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        """The network with its parameters."""
        params = {name: x for name, x in params.items() if name != CONDITIONER}
        return self.network.apply({"params": params}, x_t, t, cond, control)

    def moments(self, constants: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        """The codec's moments of a batch: from the cache on the devices, from the cache on disk, or of the images."""
        if "row" in batch:
            return constants["moments"][batch["row"]]
        if "moments" in batch:
            return batch["moments"]
        return self.codec.encode(constants["codec"], to_float(batch["image"]))

    def draw_inputs(self, constants: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, Any]:
        """Draws the random inputs of a step for the batch: latents, noise, times, and which conditions are dropped."""
        x0 = self.codec.sample_latent(named_key(key, "posterior"), self.moments(constants, batch))
        inputs = {
            "x0": x0,
            "noise": jax.random.normal(named_key(key, "noise"), x0.shape, jnp.float32),
            "t": self.process.sample_time(named_key(key, "time"), x0.shape[0]),
            "batch": {name: batch[name] for name in self.conditioner.batch_spec()},
        }
        if self.has_null_condition:
            inputs["dropped"] = jax.random.bernoulli(named_key(key, "label_dropout"), self.cond_dropout, x0.shape[:1])
        return inputs

    def loss(
        self,
        params: Any,
        constants: Mapping[str, Any],
        x0: jax.Array,
        noise: jax.Array,
        t: jax.Array,
        batch: Mapping[str, jax.Array],
        dropped: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss, and per example the loss and its named parts."""
        params = self.network_params(params, constants)
        x_t = self.process.perturb(x0, noise, t)
        cond, null = self.condition(params, constants, batch)
        if dropped is not None:
            cond = guiding.replace_condition(dropped, cond, null)
        output = self.apply(params, self.process.network_input(x_t, t), self.process.network_time(t), cond)
        loss, parts = self.process.loss(output, x0, noise, t)
        return loss.mean(), {"loss": loss, **parts}

    def gradients(self, params: Any, constants: Mapping[str, Any], inputs: dict[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        """(gradients of the mean loss, per-example losses [B])."""
        gradient = jax.grad(lambda params, part: self.loss(params, constants, **part), has_aux=True)
        return accumulate(lambda part: gradient(params, part), inputs, self.microbatches)

    def step(
        self, state: TrainState, constants: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        inputs = self.draw_inputs(constants, batch, key)
        grads, losses = self.gradients(state.params, constants, inputs)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, without_constants(updates))
        ema_params = moving_average(state.ema_params, params, self.average.gain(state.step + 1))
        finite = jnp.isfinite(losses["loss"].mean()) & jnp.isfinite(grad_norm)
        averages = updated(self.averages, state.averages, params, state.step + 1)
        finite &= is_finite_update(self.optimizer, params, (ema_params, averages))
        fields: dict[str, Any] = {"step": state.step + 1, "params": params, "ema_params": ema_params, "opt_state": opt_state}
        new = dataclasses.replace(state, **fields | ({"averages": averages} if averages else {}))
        sums = step_sums(losses, {"grad_norm": grad_norm}, finite) | self.loss_by_time(losses["loss"], inputs["t"], finite)
        return only_if(finite, new, state), sums

    def loss_by_time(self, loss: jax.Array, t: jax.Array, finite: jax.Array) -> dict[str, jax.Array]:
        """Sums of the loss over quarters of the time axis."""
        bucket = jnp.minimum((t * TIME_BUCKETS).astype(jnp.int32), TIME_BUCKETS - 1)
        return {f"loss_t{b / TIME_BUCKETS:.2f}": mean_of(loss, finite & (bucket == b)) for b in range(TIME_BUCKETS)}

    def description(self) -> list[str]:
        params = count_parameters(jax.eval_shape(self.init_params, jax.random.key(0)))
        lines = [
            f"model      {self.network.describe()}: {params / 1e6:.2f} M parameters, {self.macs() / 1e9:.3f} GMACs per image",
            f"latents    {' x '.join(map(str, self.latent_shape))} of {type(self.codec).__name__}",
        ]
        if self.adaptation.active:
            trained = count_parameters(jax.eval_shape(self.init, jax.random.key(0)).params)
            adapters = f", adapters of rank {self.adaptation.lora.rank}" if self.adaptation.lora.rank else ""
            lines.append(f"trained    {trained / 1e6:.3f} M parameters{adapters}; the others are frozen")
        return lines

    def draw_latents(
        self,
        params: Any,
        constants: Mapping[str, Any],
        keys: jax.Array,
        requests: Mapping[str, jax.Array],
        sampler: Callable[..., jax.Array],
        guidance: guiding.Guidance,
        weak: Callable[..., jax.Array] | None = None,
        forecast: Forecast | None = None,
        noise: jax.Array | None = None,
        watch: Callable[[jax.Array, Any, jax.Array], None] | None = None,
        around: Callable[[Denoise], Denoise] | None = None,
    ) -> jax.Array:
        """Latents from the network, for `decode`.

        Args:
            params: usually the moving average.
            constants: {"conditioner": ...} of a frozen encoder; {} for labels.
            keys: [B] one key per image: an image depends only on its key and its request.
            requests: arrays [B, ...] as `Conditioner.from_requests` returns them.
            weak: the second network of autoguidance, called as a `Network` with its parameters bound.
            forecast: selects the steps that run the network's blocks; None for all.
            noise: f32[B, h, w, c], the x_t that the sampler starts from; None is noise of the keys (`Process.start` of
                `initial_noise`).
            watch: see `diffusion.process.Watched`.
            around: changes the denoiser that the sampler calls, such as `diffusion.known.KnownRegion`.

        Returns:
            float32[B, h, w, c].
        """
        cond, null = self.condition(params, constants, requests)

        def network(*args):
            return self.apply(params, *args)

        skips = self.skips(guidance, sampler)

        def without_layers(x, t, cond):
            assert skips is not None  # called only where there are some
            return self.apply(params, x, t, cond, skips.control)

        def predict_with(network):
            skipped, times = (None, (0.0, 1.0)) if skips is None else (without_layers, skips.times)
            guided = guidance(network, cond, null, weak, self.process.min_time, skipped, times)

            def predict(x_t, t):
                output = guided(self.process.network_input(x_t, t), t, self.process.network_time(t))
                return self.process.predict(output, x_t, t)

            return predict

        denoise: Denoise = Memoryless(predict_with(network))
        if forecast and forecast.active:
            run, run_head = self.parts(params)
            denoise = ForecastingDenoise(forecast, run, run_head, predict_with)
        if around is not None:
            denoise = around(denoise)
        if watch is not None:
            denoise = Watched(denoise, watch)
        if noise is None:
            noise = self.process.start(self.initial_noise(keys), start_time(sampler, self.process))
        step_keys = jax.vmap(named_key, (0, None))(keys, "steps")
        return sampler(self.process, denoise, noise, step_keys)

    def skips(self, guidance: guiding.Guidance, sampler: Any) -> Skips | None:
        """What skip-layer guidance needs; None where it is off.

        Raises:
            UserError: the network cannot skip these blocks; the sampler has no grid of times, or no step that is guided so.
        """
        if not guidance.skip_layers:
            return None
        control = networks.skipping(self.network, guidance.skip_layers)
        if not can_start(sampler):
            raise UserError(
                f"guidance.skip_layers is {guidance.skip_layers}, and sampler {type(sampler).__name__} has no grid of times, of "
                "which skip_low and skip_high are shares; choose another sampler, such as euler or dpmpp"
            )
        return Skips(control, guidance.skip_times(sampler.times(self.process)))

    def initial_noise(self, keys: jax.Array) -> jax.Array:
        """f32[B, h, w, c]: the standard normal noise that sampling starts from, for keys [B]."""
        return noise_like(jax.vmap(named_key, (0, None))(keys, "noise"), self.latent_shape)

    def parts(self, params: Any) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[..., jax.Array]]:
        """(run, run_head) of a network in three parts, for `ForecastingDenoise`."""
        params = {name: x for name, x in params.items() if name != CONDITIONER}

        def part(name, *args):
            return self.network.apply({"params": params}, *args, method=name)

        def run(x, time, cond):
            embedded = part("embed", x, time, cond)
            after = part("run_blocks", embedded)
            return part("head", after, embedded, x.shape), after - embedded.x

        def run_head(x, time, cond, residual):
            embedded = part("embed", x, time, cond)
            return part("head", embedded.x + residual, embedded, x.shape)

        return run, run_head

    def decode(self, constants: Mapping[str, Any], latents: jax.Array) -> jax.Array:
        """uint8[B, H, W, C] images of latents [B, h, w, c]."""
        return self.decode_and_check(constants, latents)[0]

    def decode_and_check(self, constants: Mapping[str, Any], latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(`decode`, whether each image was finite before it was rounded: bool[B])."""
        images = self.codec.decode(constants["codec"], latents)
        return to_uint8(images), jnp.isfinite(images).all(tuple(range(1, images.ndim)))
