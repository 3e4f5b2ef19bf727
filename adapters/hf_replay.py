"""Runs a Hugging Face mixture of experts under routes that another engine chose.

The weights of forced experts must be what the model's own router would give them, and every family
computes them differently: softmax before or after the choice, sigmoid, bias, groups, scaling. So no
formula is repeated here. While a router runs, the one ``topk`` that chooses K of its E experts
gives the forced ids instead of the highest, with the values of those ids, and the rest of the
router's own code does what it always does with a choice.

A cell whose forced set is the one that the router chose by itself stays native to the bit: another
order of the same experts would only move the last bits of their sum.

Shape letters: ``S`` positions fed, ``E`` experts, ``K`` experts per token, ``L`` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from driftgate.errors import TeacherError

__all__ = ["forced", "watched"]

TOPK = (torch.topk, Tensor.topk)


@contextmanager
def forced(
    routers: list[nn.Module], experts: list[int], routes_SLK: Tensor, given_SL: Tensor
) -> Iterator[None]:
    """Make the next forward of each of ``routers`` (by layer) choose ``routes_SLK`` where
    ``given_SL`` is true.

    ``experts``: E of each router. Raises ``TeacherError`` inside the forward of a router that does
    not choose by one ``topk`` over its experts.
    """
    with ExitStack() as stack:
        for layer, (module, count) in enumerate(zip(routers, experts, strict=True)):
            choice = _Choice(routes_SLK[:, layer], given_SL[:, layer], count)
            before = module.register_forward_pre_hook(choice.enter)
            stack.callback(before.remove)
            # Also when the router fails: the mode must not outlive it.
            after = module.register_forward_hook(choice.leave, always_call=True)
            stack.callback(after.remove)
        yield


@contextmanager
def watched(routers: list[nn.Module]) -> Iterator[list[str]]:
    """Say of the next forward of each of ``routers`` why it could not have been ``forced``.

    Nothing is changed. The list is complete once all have run, and empty where all can.
    """
    faults: list[str] = []
    with ExitStack() as stack:
        for module in routers:
            watch = _Watch(faults)
            before = module.register_forward_pre_hook(watch.enter)
            stack.callback(before.remove)
            after = module.register_forward_hook(watch.leave, always_call=True)
            stack.callback(after.remove)
        yield faults


class _Watch(TorchFunctionMode):
    """What one router's forward chooses by."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__()
        self._faults = faults
        self._seen: list[tuple[int, Tensor]] = []

    def enter(self, *_: object) -> None:
        """Forward pre-hook."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, _args: object, output: Any) -> None:
        """Forward hook; always called."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if not isinstance(output, tuple) or len(output) != 3:
            return  # the forward failed, or the tap will say what is wrong
        logits_SE, _, ids_SK = output
        made = [ids for width, ids in self._seen if width == logits_SE.shape[-1]]
        chosen = [ids for ids in made if ids.shape == ids_SK.shape]
        if len(chosen) != 1 or not torch.equal(chosen[0].sort(-1)[0], ids_SK.sort(-1)[0]):
            self._faults.append(
                f"{type(module).__name__} does not choose its experts by one topk over "
                f"{logits_SE.shape[-1]}: routes cannot be replayed in it"
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note what a topk chose; everything runs as it is."""
        result = func(*args, **(kwargs or {}))
        if func in TOPK:
            scores = args[0] if args else (kwargs or {})["input"]
            self._seen.append((int(scores.shape[-1]), result[1]))
        return result


class _Choice(TorchFunctionMode):
    """One router's forced choice, in force while its forward runs."""

    def __init__(self, ids_SK: Tensor, given_S: Tensor, experts: int) -> None:
        super().__init__()
        # An id that the router does not have is no choice of its model.
        self._given_S1 = (given_S & (ids_SK < experts).all(-1))[:, None]
        self._ids_SK = ids_SK.clamp(max=experts - 1)
        self._experts = experts
        self._times = 0

    def enter(self, *_: object) -> None:
        """Forward pre-hook."""
        self._times = 0
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, *_: object) -> None:
        """Forward hook; always called."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._times != 1:
            raise TeacherError(
                f"{type(module).__name__} chose its experts by {self._times} topk over "
                f"{self._experts}, not by one: routes cannot be replayed in it"
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the router's choice among its experts; everything else runs as it is."""
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        wanted = (len(self._ids_SK), self._experts)
        if tuple(scores.shape) != wanted or result[1].shape != self._ids_SK.shape:
            return result
        self._times += 1
        native_SK = result[1]
        same_S1 = (native_SK.sort(-1)[0] == self._ids_SK.sort(-1)[0]).all(-1, keepdim=True)
        ids_SK = torch.where(self._given_S1 & ~same_S1, self._ids_SK, native_SK)
        return torch.return_types.topk((scores.gather(-1, ids_SK), ids_SK))
