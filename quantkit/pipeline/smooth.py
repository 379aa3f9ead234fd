"""Transforms on one block: its scaling groups, the scale each gets, and the proof that it still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from quantkit.calibration.collect import Gatherer
from quantkit.calibration.forward import refusing
from quantkit.calibration.held import HeldLinear
from quantkit.calibration.walk import BlockRun
from quantkit.errors import NumericalError
from quantkit.models.families import ATTENTION_LOGIT_NAMES
from quantkit.plan import LayerPlan
from quantkit.structure.discover import discover
from quantkit.structure.fold import ScalingGroup, fold
from quantkit.transforms.awq import clip, search_scale
from quantkit.transforms.config import AwqConfig

PROOF_TOLERANCE = 2e-3  # change of the block's output after a real fold, relative to its RMS, in fp32


@dataclass
class Smoother:
    """Applies the recipe's transforms to each block. Groups are discovered and proved once per block structure."""

    configs: tuple[AwqConfig, ...]
    known: dict[tuple, tuple[list[ScalingGroup], list[tuple[str, str]]]] = field(default_factory=dict)

    def groups(self, run: BlockRun) -> tuple[list[ScalingGroup], list[tuple[str, str]]]:
        """The proved groups of this block, and the pairings that were refused with the reason."""
        shape = tuple((n, tuple(p.shape)) for n, p in run.module.named_parameters())
        if shape not in self.known:
            hidden = run.streams.leading[:1].to(run.device)
            call = run.calls[1]
            run.select(full=True)
            where = f"scaling groups of decoder block {run.index} ({type(run.module).__name__}, in float64)"
            with refusing(where, instead="leave out the awq transform"):
                self.known[shape] = discover(run.module, hidden, call.args, call.kwargs)
        return self.known[shape]

    @torch.no_grad()
    def apply(
        self, run: BlockRun, plans: dict[str, LayerPlan], stored: dict[str, torch.dtype]
    ) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """Transform the block's weights in place.

        plans: planned linears by module name inside the block. stored: the dtype of every parameter on disk.
        Returns the unplanned parameters that changed (by name inside the block, in stored dtype) and a report.
        """
        changed: dict[str, torch.Tensor] = {}
        report: list[dict] = []
        for config in self.configs:
            for held in run.held.values():
                held.weight.data = held.weight.data.float()
            if config.scale:
                proved, refused = self.groups(run)
                groups = [g for g in proved if _planned(g, plans)]
                names = {n for g in groups for n in (g.inspect, g.consumers[0])}
                # one pass serves all groups: a group's own fold is all that changes its consumers' input
                seen = run.observe(names, config.windows)
                report += [self._scale(run, g, seen, plans, stored, config, changed) for g in groups]
                del seen
                report += _left_out(run.trace.stages, proved, refused, plans)
            if config.clip is True or (
                config.clip == "auto" and all(p.algorithm.name == "rtn" for p in plans.values())
            ):
                self._clip(run, plans, stored, config)
        return changed, report

    def _scale(
        self,
        run: BlockRun,
        group: ScalingGroup,
        seen: dict[str, list],
        plans: dict[str, LayerPlan],
        stored: dict[str, torch.dtype],
        config: AwqConfig,
        changed: dict[str, torch.Tensor],
    ) -> dict:
        held = [run.held[n] for n in group.consumers]
        grids = [plans[n].scheme.weights for n in group.consumers]
        dtype = stored[f"{group.consumers[0]}.weight"]
        inputs = [args[0] for args, _, _ in seen[group.consumers[0]]]
        mean_abs = _gathered("mean_abs", inputs, run.device)
        if group.expand is not None:
            mean_abs = _by_channel(mean_abs, group.expand)
        loss = _output_error(run, group, held, seen)
        run.select(full=True)
        found = search_scale(
            mean_abs, group.expand, [m.weight for m in held], grids, dtype, loss, config.grid
        )
        report = {
            "producer": group.producer,
            "consumers": list(group.consumers),
            "exponent": found.exponent,
            "loss": found.loss,
            "identity_loss": found.identity_loss,
        }
        if found.exponent is None:
            return report
        chunk = run.chunks()[0]
        full = run.streams.full is not None
        before = run.forward(chunk, full)
        producer = run.module.get_submodule(group.producer)
        fold(run.module, group, found.scale, stored.get(f"{group.producer}.weight"))
        moved = float(
            (run.forward(chunk, full) - before).square().mean().sqrt() / before.square().mean().sqrt()
        )
        if not moved < PROOF_TOLERANCE:
            raise NumericalError(
                f"folding scales from {group.producer} into {', '.join(group.consumers)} in block {run.index} changed "
                f"its output by {moved:.2g} of its RMS (limit {PROOF_TOLERANCE:g}); leave out the awq transform"
            )
        for leaf, parameter in producer.named_parameters(recurse=False):
            name = f"{group.producer}.{leaf}"
            if group.form != "rows" or leaf == "bias":
                changed[name] = parameter.data.to(stored[name])
        return report | {"output_change": moved}

    def _clip(
        self, run: BlockRun, plans: dict[str, LayerPlan], stored: dict[str, torch.dtype], config: AwqConfig
    ) -> None:
        seen = run.observe([n for n in plans if not _in_logits(n)], config.windows)
        for name, plan in plans.items():
            if _in_logits(name):
                continue
            x = torch.cat([args[0].reshape(-1, plan.shape[1]) for args, _, _ in seen[name]])
            sample = _gathered("sample", [x], run.device)
            module = run.held[name]
            module.weight.data = clip(
                module.weight.data, sample, plan.scheme.weights, stored[f"{name}.weight"]
            )


def _output_error(
    run: BlockRun, group: ScalingGroup, held: list[HeldLinear], seen: dict[str, list]
) -> Callable[[list[torch.Tensor]], float]:
    """Mean squared error of the inspected module's output as a function of the consumers' weights.

    A single linear needs no forward: its output error is tr(E H E^T).
    """
    if group.inspect == group.consumers[0]:
        hessian = _gathered("hessian", [args[0] for args, _, _ in seen[group.inspect]], run.device)

        def of_linear(weights: list[torch.Tensor]) -> float:
            off = weights[0] - held[0].weight
            return float(((off @ hessian) * off).sum())

        return of_linear
    calls = seen[group.inspect]
    inspected = run.module.get_submodule(group.inspect) if group.inspect else run.module

    def of_module(weights: list[torch.Tensor]) -> float:
        for module, weight in zip(held, weights, strict=True):
            module.override = weight
        total, count = 0.0, 0
        for args, kwargs, wanted in calls:
            out = inspected(*args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            total += float((out - wanted).square().sum())
            count += wanted.numel()
        for module in held:
            module.override = None
        return total / count

    return of_module


def _in_logits(name: str) -> bool:
    """Whether a linear's error is seen through attention logits, where its own output error misleads the clip."""
    return any(part in name for part in ATTENTION_LOGIT_NAMES)


def _planned(group: ScalingGroup, plans: dict[str, LayerPlan]) -> bool:
    """Whether all a fold would change is quantized here, or is a norm."""
    return all(n in plans for n in group.consumers) and (group.form != "rows" or group.producer in plans)


def _left_out(
    stages: list[tuple[str, ...]],
    proved: list[ScalingGroup],
    refused: list[tuple[str, str]],
    plans: dict[str, LayerPlan],
) -> list[dict]:
    """One entry for every shared input of planned linears that no group scales, with the reason."""
    entries = []
    for stage in stages:
        group = next((g for g in proved if set(g.consumers) == set(stage)), None)
        if not any(n in plans for n in stage) or (group and _planned(group, plans)):
            continue
        if group:
            changes = (*stage, group.producer) if group.form == "rows" else stage
            others = [n for n in changes if n not in plans]
            why = f"{', '.join(others)} would change too and the recipe leaves it as it is"
        else:
            tried = [f"{pair}: {why}" for pair, why in refused if pair.endswith(f"-> {', '.join(stage)}")]
            why = "; ".join(tried) or "nothing before it can take the inverse scale"
        entries.append({"producer": None, "consumers": list(stage), "exponent": None, "left_out": why})
    return entries


def _gathered(field: str, inputs: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One field of `Statistics` over some inputs [..., K]."""
    gatherer = Gatherer(frozenset({field}), inputs[0].shape[-1], device)
    for x in inputs:
        gatherer.update(x)
    return getattr(gatherer.finish(), field)


def _by_channel(values: torch.Tensor, expand: torch.Tensor) -> torch.Tensor:
    """Mean of the columns that share a channel: [K] -> [channels]."""
    expand = expand.to(values.device)
    channels = int(expand.max()) + 1
    total = torch.zeros(channels, device=values.device).index_add_(0, expand, values)
    return total / torch.bincount(expand, minlength=channels)
