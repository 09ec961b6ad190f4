"""PFA, product feedback alignment: gradients flow back through learnt products of two matrices.

Li and Benna 2024, "Deep Learning without Weight Symmetry", arXiv 2405.20594. A linear layer or a
convolution z = W x + b sends its gradient g back without reading W: through the fixed random
matrix R to a population of `expansion` times as many neurons, and from there through S::

    forward     x ----------- W ---------> z
    feedback    S^T R g <-- S -- R g <-- R -- g        instead of W^T g
    updates     dW = g x^T        dS = R g x^T         R stays

R^T S takes the place of W. R has orthonormal columns, so R^T dS = dW: with the same optimizer and
weight decay, R^T S follows W, and the decay lets the difference of their starts fade (Kolen and
Pollack 1994). No synapse of the feedback is the mirror of one of the forward path. With R^T S = W
the method is backpropagation. We know the idea and the abstract of the paper; the rule of S is
derived from them. Biases, norms and activations have their exact derivatives.

The error still goes from layer to layer, so the messages are those of backpropagation. The first
layer of the model sends nothing back and has no feedback.

Invariant: no weight of the forward path is read by the feedback; cuts change nothing but the draws
of R and S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dtrain.block.block import Block
from dtrain.block.leaf_calls import replaced_outputs
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models.image_layers import PooledLinear
from dtrain.models.mlp import Dense
from dtrain.models.sequence_layers import SequenceEmbedding
from dtrain.models.vit import PatchEmbedding
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.repeated_forward import RepeatedForward

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MATRIX_MODULES = (nn.Linear, Dense, PooledLinear, *CONVOLUTIONS)
"""Modules whose weight the feedback replaces."""


EXACT_MODULES = (
    nn.modules.batchnorm._NormBase,
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding),
    *(SequenceEmbedding, PatchEmbedding),
)
"""Modules with parameters whose derivative mixes no units by weights, or is not sent back."""


@final
@dataclass(frozen=True)
class Pfa(RepeatedForward):
    """Backpropagation through learnt feedback. The last block predicts; the others have no scores.

    Parameters
    ----------
    expansion : int
        Neurons of the feedback population, per output of the layer.

    Raises
    ------
    ConfigError
        `expansion` is less than 1.
    """

    needs_layers: ClassVar[bool] = True

    expansion: int = 1

    def __post_init__(self) -> None:
        if self.expansion < 1:
            raise ConfigError(
                "objective.expansion-too-small",
                f"[objective] expansion = {self.expansion} must be at least 1",
            )

    def check_layers(self, layers: Mapping[str, nn.Module], is_chain: bool) -> None:
        """Refuse modules with parameters that are neither linear layers, convolutions nor norms."""
        for root, layer in layers.items():
            for name, module in layer.named_modules(prefix=root):
                known = type(module) in MATRIX_MODULES or isinstance(module, EXACT_MODULES)
                if not known and list(module.parameters(recurse=False)):
                    raise ConfigError(
                        "objective.module-without-feedback",
                        f"'pfa' has no feedback for module '{name}' ({type(module).__name__}): it "
                        "takes linear layers, convolutions and norms; change the model, or set "
                        'objective.name = "backprop"',
                    )

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return 2: the layers run twice forward and once back, and so does the feedback."""
        return 2

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether a layer of the block sends a gradient back."""
        return bool(self._fed_back(spec))

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the feedback of all layers of the block."""
        return Feedback(self._fed_back(block), self.expansion)

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Return None: the head has no forward."""

    def _fed_back(self, spec: BlockSpec) -> dict[str, nn.Module]:
        """Return the modules of a block that send a gradient back, by dotted name, on the meta
        device."""
        with torch.device("meta"):
            layers = {layer.name: layer.make() for layer in spec.own_layers}
        names = list(matrix_modules(layers).items())
        return dict(names[spec.index == 0 :])

    @contextmanager
    def other_derivatives(self, block: Block, micro_batch: MicroBatch) -> Iterator[None]:
        """Send gradients from the outputs of modules to their inputs through the feedback."""
        if block.head is None:
            yield
            return
        assert isinstance(block.head, Feedback)
        paths, inputs = block.head.by_name(), dict[str, Tensor]()
        modules = {n: m for n, m in matrix_modules(block.layers).items() if n in paths}
        assert modules.keys() == paths.keys(), "the modules are those that the plan knows"

        def couple(call: str, z: Tensor) -> Tensor:
            name = call.partition("#")[0]
            path = paths[name]
            s = path(inputs.pop(name))
            coupled = (z, s, path.matrix, path.channels_first)
            output: Tensor = Couple.apply(*coupled)  # type: ignore[no-untyped-call]
            return output.clone() if block.inplace_layers else output

        with ExitStack() as stack:
            for name, module in modules.items():
                cut = _cut_input(inputs, name)
                stack.callback(module.register_forward_pre_hook(cut).remove)
            stack.enter_context(replaced_outputs(modules, couple))
            yield


def _cut_input(inputs: dict[str, Tensor], name: str) -> Any:
    """Return a hook that keeps the input of a module and detaches it."""

    def cut(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs[name] = args[0]
        return args[0].detach(), *args[1:]

    return cut


def matrix_modules(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of layers, by dotted name."""
    return {
        name: module
        for root, layer in layers.items()
        for name, module in layer.named_modules(prefix=root)
        if type(module) in MATRIX_MODULES
    }


@final
class Feedback(nn.Module):
    """The feedback of several modules.

    Parameters
    ----------
    modules : mapping of str to nn.Module
        The modules by dotted name; only their shapes are read.
    expansion : int
        Neurons of the population per output.
    """

    def __init__(self, modules: Mapping[str, nn.Module], expansion: int) -> None:
        super().__init__()
        self.module_names = tuple(modules)
        self.paths = nn.ModuleList(FeedbackPath(m, expansion) for m in modules.values())

    def by_name(self) -> dict[str, FeedbackPath]:
        """Return the feedback of each module by its dotted name."""
        paths: dict[str, Any] = dict(zip(self.module_names, self.paths, strict=True))
        return paths


@final
class FeedbackPath(nn.Module):
    """R and S of one module: S is a module of its kind with the population as output.

    Attributes
    ----------
    matrix : Tensor
        R (population, outputs), with orthonormal columns.
    """

    identical_buffers = ("matrix",)
    matrix: Tensor

    def __init__(self, module: nn.Module, expansion: int) -> None:
        super().__init__()
        if isinstance(module, nn.Linear):
            outputs, inputs = module.out_features, module.in_features
            self.channels_first = False
            self.synapses: nn.Module = type(module)(inputs, expansion * outputs)
            self.synapses.register_parameter("bias", None)
        else:
            assert isinstance(module, CONVOLUTIONS)
            outputs = module.out_channels
            self.channels_first = True
            self.synapses = type(module)(
                module.in_channels,
                expansion * outputs,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                groups=module.groups,
                bias=False,
                padding_mode=module.padding_mode,
            )
        matrix = torch.empty(expansion * outputs, outputs)
        self.register_buffer("matrix", nn.init.orthogonal_(matrix))

    def forward(self, input: Tensor) -> Tensor:
        """Return S x, of which only the derivatives are used."""
        output: Tensor = self.synapses(input)
        return output


class Couple(Function):
    """z, whose gradient g goes to z, and as R g to the output s of the feedback."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor, matrix: Tensor, channels_first: bool) -> Tensor:
        """Return z."""
        ctx.save_for_backward(matrix)
        ctx.channels_first = channels_first
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return g and R g."""
        (matrix,), (g,) = ctx.saved_tensors, cotangents
        if ctx.channels_first:
            return g, torch.einsum("po,bo...->bp...", matrix, g), None, None
        return g, g @ matrix.T, None, None
