"""The optimizers of `torch.optim` by name, parameter groups, and gradient clipping.

Invariant: one optimizer per block, which may be a `CompositeOptimizer`. An unknown name or field is
an error before anything is built. Clipping leaves finite gradients finite.

::

    [optimizer]         matrices      | decay | no-decay |      groups of one optimizer
    [optimizer.rest]    all others    | decay | no-decay |      groups of a second one
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn, optim

from dtrain.eager_torch import defer_dynamo
from dtrain.errors import ConfigError, unknown_name
from dtrain.schema import is_quoted_number


def scale_lr_and_momentum(
    lr: float, momentum: float, batch_size: int, reference_batch_size: int
) -> tuple[float, float]:
    """Scale learning rate and momentum from a reference batch size to another.

    m = m_r^(N / N_r), and lr = lr_r (1 - m) N / ((1 - m_r) N_r): per sample, a gradient decays as
    fast and moves the weights as far in total. Weight decay does not change.

    Source: Chiley et al. 2019, "Online Normalization for Training Neural Networks".

    >>> lr, momentum = scale_lr_and_momentum(0.1, 0.9, batch_size=1, reference_batch_size=128)
    >>> f"{lr:.4g} {momentum:.8f}"
    '6.428e-06 0.99917721'
    """
    ratio = batch_size / reference_batch_size
    scaled_momentum = momentum**ratio
    return lr * ratio * (1 - scaled_momentum) / (1 - momentum), scaled_momentum


UNSUPPORTED = {"lbfgs", "sparseadam", "optimizer"}
"""LBFGS evaluates its loss several times per step, SparseAdam needs sparse gradients."""


EXTRA_KEYS = ("clip", "clip_over", "scale_from", "no_decay", "rest")
"""Keys of [optimizer] that are not fields of torch's optimizers; see `ClipSection`."""


IMPLEMENTATION_FIELDS = {"fused", "foreach", "capturable", "differentiable"}
"""Fields that select torch's implementation; with any of them no other one is selected."""


DEFAULT_LR = 1e-3
"""Learning rate of torch's SGD, where none is given."""


CLIP_EPSILON = 1e-6
"""Added to the norm before a division by it, as torch does."""


STEP_WRAPPERS = {"wrapper", "_use_grad"}
"""Names of torch's functions around the step of its optimizers: the profiler's hook, and
`_use_grad_for_differentiable`, which imports `torch._dynamo`."""


defer_dynamo(
    optim.Optimizer.add_param_group,
    optim.Optimizer.state_dict,
    optim.Optimizer.load_state_dict,
    optim.Optimizer.zero_grad,
)


def optimizer_classes() -> dict[str, type[optim.Optimizer]]:
    """Return the optimizers of the installed torch that a run file may name, in lower case."""
    return {
        name.lower(): member
        for name, member in inspect.getmembers(optim, inspect.isclass)
        if issubclass(member, optim.Optimizer) and name.lower() not in UNSUPPORTED
    }


def check_optimizer(
    name: str,
    fields: Mapping[str, Any],
    section: str = "optimizer",
    extra_keys: Sequence[str] = EXTRA_KEYS,
) -> None:
    """Raise `ConfigError` for an unknown optimizer or field, or a value that torch rejects."""
    legal_fields = list(inspect.signature(_optimizer_class(name)).parameters)[1:]
    for field, value in fields.items():
        if field not in legal_fields:
            raise unknown_name(
                f"key in [{section}] of '{name}'",
                field.replace("_", "-"),
                (legal.replace("_", "-") for legal in (*legal_fields, *extra_keys)),
                key="run-file.unknown-key",
            )
        if is_quoted_number(value):
            raise ConfigError(
                "run-file.quoted-number",
                f'[{section}] {field.replace("_", "-")} = "{value}" is a text: drop the quotes',
            )
    make_optimizer(name, fields, [nn.Parameter(torch.zeros(2, 2))])


class NamedParameter(NamedTuple):
    """A parameter with its global name, and the class of the module that holds it."""

    name: str
    parameter: nn.Parameter
    module_class: str

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a real matrix, but no embedding; muon is made for these."""
        parameter = self.parameter
        is_embedding = self.module_class.startswith("Embedding")
        return parameter.dim() == 2 and not parameter.is_complex() and not is_embedding

    def matches(self, pattern: str) -> bool:
        """Return whether its name, or the class of its module, contains a pattern; any case."""
        return pattern.lower() in self.name.lower() or pattern.lower() in self.module_class.lower()


OptimizerFactory = Callable[[Sequence[NamedParameter]], optim.Optimizer]
"""Makes the optimizer of a block from its trained parameters."""


@final
@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer that a run file describes; call it with parameters to make one.

    Attributes
    ----------
    name, fields
        Those of `make_optimizer`.
    no_decay : tuple of str
        Parameters that match any of these patterns have a weight decay of 0.
    rest : OptimizerSettings or None
        The optimizer of all parameters that are no hidden matrices; None: there is one for all.
    """

    name: str
    fields: Mapping[str, Any]
    no_decay: tuple[str, ...] = ()
    rest: OptimizerSettings | None = None

    def __call__(self, parameters: Sequence[NamedParameter]) -> optim.Optimizer:
        """Return the optimizer of these parameters, of which there is at least one."""
        if self.rest is None:
            return self._make(parameters)
        matrices = [parameter for parameter in parameters if parameter.is_hidden_matrix]
        others = [parameter for parameter in parameters if not parameter.is_hidden_matrix]
        optimizers = [self._make(matrices)] if matrices else []
        return combine_optimizers([*optimizers, *([self.rest._make(others)] if others else [])])

    def _make(self, parameters: Sequence[NamedParameter]) -> optim.Optimizer:
        no_decay = [p for p in parameters if any(map(p.matches, self.no_decay))]
        names = {parameter.name for parameter in no_decay}
        return make_optimizer(
            self.name,
            self.fields,
            [p.parameter for p in parameters if p.name not in names],
            [p.parameter for p in no_decay],
        )


def make_optimizer(
    name: str,
    fields: Mapping[str, Any],
    parameters: Iterable[nn.Parameter],
    no_decay: Iterable[nn.Parameter] = (),
) -> optim.Optimizer:
    """Return the optimizer `name` over `parameters` and, without weight decay, over `no_decay`.

    On the CPU it takes torch's fused step where there is one, unless a field selects another
    implementation: the same rule up to rounding, in one pass over memory. Complex parameters have
    no fused step.

    Raises
    ------
    ConfigError
        torch rejects a field, or the shape of a parameter.
    """
    decaying, undecayed, optimizers = list(parameters), list(no_decay), []
    for is_complex in (False, True):
        groups: list[dict[str, Any]] = [
            {"params": [p for p in decaying if p.is_complex() == is_complex]},
            {
                "params": [p for p in undecayed if p.is_complex() == is_complex],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        optimizers += [_make_plain_optimizer(name, fields, groups)] if groups else []
    return combine_optimizers(optimizers)


def _make_plain_optimizer(
    name: str, fields: Mapping[str, Any], groups: list[dict[str, Any]]
) -> optim.Optimizer:
    """Return one optimizer of torch over parameter groups."""
    trainable = [parameter for group in groups for parameter in group["params"]]
    optimizer_class = _eager_class(name)
    if "weight_decay" not in inspect.signature(optimizer_class).parameters and any(
        "weight_decay" in group for group in groups
    ):
        raise ConfigError(
            "optimizer.no-decay-without-weight-decay",
            f"[optimizer] no-decay is for optimizers with weight-decay, which '{name}' has not: "
            "leave it out",
        )
    fused = _fused_option(optimizer_class, fields, trainable)
    try:
        optimizer = optimizer_class(groups, **fields, **fused)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        _refuse_other_shapes(name, fields, trainable)
        raise ConfigError(
            "optimizer.rejected", f"[optimizer] '{name}' rejects {dict(fields)}: {error}"
        ) from error
    if optimizer.defaults.get("fused"):
        optimizer.register_step_pre_hook(_prepare_fused_step)
    return optimizer


def _refuse_other_shapes(
    name: str, fields: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Refuse parameters that are no matrices where the optimizer takes nothing else."""
    others = [parameter for parameter in parameters if parameter.dim() != 2]
    try:
        _eager_class(name)([nn.Parameter(torch.zeros(2, 2))], **fields)
    except Exception:  # then the fields are at fault
        return
    if others:
        raise ConfigError(
            "optimizer.needs-matrices",
            f"[optimizer] '{name}' takes matrices only, but {len(others)} parameters of a block "
            f"have other shapes, such as {tuple(others[0].shape)}: give them an optimizer in "
            'a table [optimizer.rest], such as name = "adamw" and an lr',
        )


def combine_optimizers(optimizers: Sequence[optim.Optimizer]) -> optim.Optimizer:
    """Return the only optimizer, or all of them as one."""
    return optimizers[0] if len(optimizers) == 1 else CompositeOptimizer(optimizers)


@cache
def _eager_class(name: str) -> type[optim.Optimizer]:
    """Return a subclass of an optimizer whose step is the same and does not import
    `torch._dynamo`.

    Only a compiled step needs that import. A class that is not torch's own is returned as it is.
    """
    optimizer_class = _optimizer_class(name)
    if not optimizer_class.__module__.startswith("torch.optim."):
        return optimizer_class
    plain_step = inspect.unwrap(optimizer_class.step, stop=_is_own_step)

    def step(self: optim.Optimizer, closure: Callable[[], float] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return plain_step(self, closure)

    members = {
        "__module__": optimizer_class.__module__,
        "__doc__": optimizer_class.__doc__,
        "step": step,
    }
    return type(optimizer_class.__name__, (optimizer_class,), members)


def _is_own_step(function: Callable[..., Any]) -> bool:
    """Return whether a function is that of the optimizer, and not one that torch put around it."""
    code = getattr(function, "__code__", None)
    return code is None or code.co_name not in STEP_WRAPPERS


@final
class CompositeOptimizer(optim.Optimizer):
    """Several optimizers that step together.

    Parameter groups and states are those of the parts, not copies: a learning rate that is set
    here acts there.
    """

    def __init__(self, optimizers: Sequence[optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self._share_parts()

    def _share_parts(self) -> None:
        """Use the parameter groups of the parts, and one state for all."""
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.optimizers:
            self.state.update(part.state)
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take the steps of all parts."""
        assert closure is None
        for part in self.optimizers:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all parts; parameters are numbered in the order of the groups."""
        start = 0
        for part in self.optimizers:
            own_groups = part.param_groups
            count = sum(len(group["params"]) for group in own_groups)
            state = {n: state_dict["state"].get(start + n) for n in range(count)}
            part.state = defaultdict(dict)
            part.load_state_dict(
                {
                    "state": {n: entries for n, entries in state.items() if entries is not None},
                    "param_groups": part.state_dict()["param_groups"],
                }
            )
            start += count
        self._share_parts()


def _fused_option(
    optimizer_class: type[optim.Optimizer], fields: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the field that selects torch's fused step, empty where it is missing or not exact.

    The fused step rounds differently in bfloat16, and ignores the strides of a tensor that is not
    contiguous. With dampening it cannot start a momentum beside others (`_prepare_fused_step`).
    """
    legal_fields = inspect.signature(optimizer_class).parameters
    exact = all(
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.float64)
        and parameter.is_contiguous()
        for parameter in parameters
    )
    excluded = IMPLEMENTATION_FIELDS & {*fields} or fields.get("dampening")
    return {"fused": True} if exact and "fused" in legal_fields and not excluded else {}


def _prepare_fused_step(optimizer: optim.Optimizer, *_: Any) -> None:
    """Make gradients contiguous as their parameters are: a fused step reads both in one order.

    Where some parameters have a momentum, those that get their first gradient are given a momentum
    of zero, since fused SGD needs it for all or none. Without dampening the first step from zero
    is that of torch.
    """
    for group in optimizer.param_groups:
        reached = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in reached:
            if not parameter.grad.is_contiguous():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        if not group.get("momentum"):
            continue
        new = [p for p in reached if optimizer.state[p].get("momentum_buffer") is None]
        if len(new) < len(reached):
            for parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def squared_norm(gradients: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all elements, computed in float64.

    The sums of the tensors are added in the order given: the same bits in every repetition with the
    same number of threads. The norm of a model is the root of the sum over its blocks.
    """
    norms = (torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients)
    return sum((float(norm) ** 2 for norm in norms), 0.0)


def clip_by_norm_(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Multiply gradients by ``max_norm / (norm + 1e-6)`` in place, where that is less than 1.

    The rule of `torch.nn.utils.clip_grad_norm_`, up to rounding. A norm that is NaN or infinite
    leaves the gradients unchanged; the checks of losses and weights report the cause.

    Parameters
    ----------
    norm : float
        The L2 norm that is limited: ``squared_norm(gradients) ** 0.5``, or that of the model.
    max_norm : float
        The limit, more than 0.
    """
    scale = max_norm / (norm + CLIP_EPSILON)
    if math.isfinite(norm) and scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)


def _optimizer_class(name: str) -> type[optim.Optimizer]:
    classes = optimizer_classes()
    optimizer_class = classes.get(name.replace("-", "").lower())
    if optimizer_class is None:
        raise unknown_name("optimizer", name, classes)
    return optimizer_class
