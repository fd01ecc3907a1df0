"""The loop pass: layers that share their weights, each block stored once, with a small part of each layer's own.

See ``docs/passes/loop.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes import calibration_text
from passes.base import (
    LoadOptions,
    LoadRecord,
    MeasureContext,
    Measured,
    ModelProfile,
    Pass,
    PassContext,
    PassError,
    PassRecord,
    Prediction,
    SourceContext,
    SourceTexts,
)
from passes.loop.parameters import LoopParameters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes.loop.blocks import Statistics
    from passes.loop.layout import Groups
    from passes.loop.targets import Structure
    from passes.loop.training import Trained

__all__ = ["LoopParameters", "LoopPass"]

SHARD_BYTES = 2 * 10**9


class LoopPass(Pass):
    """Runs several layers with one set of linear weights, stored once."""

    name = "loop"
    title = "Layers that share their weights (looped transformer)"
    papers = (
        "Bae et al., Relaxed Recursive Transformers, ICLR 2025, arXiv:2410.20672",
        "Dehghani et al., Universal Transformers, ICLR 2019, arXiv:1807.03819",
        "Lan et al., ALBERT, ICLR 2020, arXiv:1909.11942",
    )
    parameters_type = LoopParameters
    changes = frozenset({"weights", "structure"})
    before = ("quantize",)
    excludes = ("loop",)
    gentler = "heal_tokens=5M, or a larger rank or density"
    from_config = "from_scratch=true,train_text=FILE,train_tokens=5M,blocks=4,loops=3"

    parameters: LoopParameters

    @classmethod
    def alternatives(cls) -> tuple[dict[str, Any], ...]:
        """Return what ``effcli plan`` compares: shares of the parameters to keep."""
        return ({"target": 0.9}, {"target": 0.8}, {"target": 0.7})

    @property
    def needs_calibration(self) -> bool:
        """Whether text is run: to fit weights, or to measure what sharing costs."""
        parameters = self.parameters
        return parameters.is_fitted or parameters.chosen_pattern == "free" or parameters.heal_tokens > 0

    def check_complete(self) -> None:
        """Refuse to run without blocks and loops, or a target."""
        if not self.parameters.is_complete:
            raise PassError(
                "loop needs blocks and loops (their product is the number of layers), or a target: "
                "loop:blocks=15,loops=2 or loop:target=0.75; see: effcli plan MODEL --pass loop"
            )
        if self.parameters.from_scratch:
            from passes.loop.scratch_text import check_given

            check_given(self.parameters)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose layers cannot share weights as asked."""
        from passes.loop import grouping, targets

        structure = targets.find(model)
        grouping.check(self.parameters, structure)
        if self.parameters.runtime == "depth-batched":
            from passes.loop import rows

            shareable = [(index,) for index in range(structure.layers) if index not in structure.unshareable]
            rows.check(model, structure.stack, shareable)
        if self.parameters.from_scratch:
            from passes.loop import scratch

            scratch.check(self.parameters, model)

    @property
    def source_recipe(self) -> Mapping[str, Any] | None:
        """What the unshared twin depends on, where both are trained from scratch."""
        if not self.parameters.from_scratch:
            return None
        from passes.loop import scratch

        return scratch.recipe(self.parameters)

    def build_source(self, folder: Path, context: SourceContext) -> tuple[str, ...]:
        """Train the unshared twin of a config; see :mod:`passes.loop.scratch`."""
        from passes.loop import scratch

        return scratch.build_twin(folder, self.parameters, context)

    def source_texts(self, source: Path) -> SourceTexts:
        """Return the text that both were trained on, and the end of it that neither was."""
        from passes.loop import scratch

        return SourceTexts(calibration=self.parameters.train_text, evaluation=source / scratch.HELD_OUT)

    def plan(self, profile: ModelProfile) -> Prediction:
        """Predict bytes, times and memory; see :mod:`passes.loop.plan`."""
        from passes.loop import targets
        from passes.loop.plan import predict

        prediction = predict(self.parameters, profile, targets.find(profile.model))
        if self.parameters.from_scratch:
            from passes.loop import scratch

            return scratch.predict(prediction, self.parameters, profile)
        return prediction

    def shapes_after(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the looped model on the meta device."""
        from passes.loop import targets
        from passes.loop.convert import on_meta
        from passes.loop.plan import expected

        return on_meta(model, expected(self.parameters, targets.find(model)))

    def apply(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Choose which layers share, fit their weights, and make the model a looped one."""
        from passes.loop import blocks, own_text, record, targets
        from passes.loop.convert import convert, fill
        from passes.loop.layout import LoopPlan

        self.check_complete()
        if self.parameters.from_scratch:
            return self._from_scratch(model, context)
        parameters, structure = self.parameters, targets.find(model)
        batches: list[torch.Tensor] = []
        if self.needs_calibration:
            batches = calibration_text.batches(
                context, parameters.samples, parameters.length,
                without="loop fits shared weights to text; give a calibration text",
            )  # fmt: skip
        drawn = self._drawn(model, context)
        if drawn is not None and batches:
            batches = own_text.mixed(batches, drawn)
        groups, ranks, damages, observed = self._groups(model, structure, batches, context)
        original = copy.deepcopy(model) if parameters.heal_tokens else None
        even = LoopPlan.even(structure, groups, ranks, parameters.density)
        found = blocks.fit(
            model, structure, even, parameters, batches if parameters.is_fitted else [],
            seed=context.seed, progress=context.progress, observed=observed,
        )  # fmt: skip
        plan = found.plan
        plan.check(structure)
        sizes = plan.sizes(structure)
        convert(model, plan, plan.to_json(sizes) | parameters.loop_entries)
        fill(model, plan, found.fitted)
        healed = None if original is None else self._heal(model, original, drawn, context)
        text = context.calibration
        details: dict[str, Any] = {
            "plan": plan.to_json(sizes),
            "sizes": record.plain(sizes),
            "error_of": "outputs" if parameters.is_fitted else "weights",
            "shared_error": record.shared_errors(plan, found),
            "moment_runs": found.runs,
            "similarity": [
                {"layers": list(layers), "before": before, "after": after}
                for layers, (before, after) in found.similarity.items()
            ],
        }
        if healed is not None:
            details["healing"] = asdict(healed)
            details["curves"] = [record.curve(healed)]
        if damages:
            details["damages"] = [
                {"layers": list(group), "kl": damage, "chosen": group in groups} for group, damage in damages.items()
            ]
        if text is not None and batches:
            tokens = parameters.samples * parameters.length
            details["calibration"] = {
                "text": text.name, "samples": parameters.samples, "length": parameters.length, "tokens": tokens,
            }  # fmt: skip
        return PassRecord(
            name=self.name,
            parameters=parameters.model_dump(mode="json"),
            summary=record.summary(plan, sizes) + ("" if healed is None else f", healed on {healed.tokens:,} tokens"),
            seed=context.seed,
            layers=record.records(structure, plan, found),
            skipped=record.skipped(parameters, structure, plan),
            notes=(*record.notes(plan, sizes), *record.healing_notes(healed)),
            details=details,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def _from_scratch(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Train the looped model as its twin was, from random weights."""
        from passes.loop import grouping, record, scratch, scratch_record, targets
        from passes.loop.layout import LoopPlan

        parameters, structure = self.parameters, targets.find(model)
        plan = LoopPlan.even(structure, grouping.regular(parameters, structure), parameters.even_rank)
        plan.check(structure)
        sizes = plan.sizes(structure)
        said = scratch.train_looped(model, structure, plan, parameters, context)
        return PassRecord(
            name=self.name,
            parameters=parameters.model_dump(mode="json"),
            summary=f"{record.summary(plan, sizes)}, {scratch_record.summary(said)}",
            seed=context.seed,
            layers=record.records(structure, plan, None),
            skipped=record.skipped(parameters, structure, plan),
            notes=(*record.notes(plan, sizes), *scratch_record.notes(said)),
            details={
                "plan": plan.to_json(sizes),
                "sizes": record.plain(sizes),
                "from_scratch": said,
                "curves": [scratch_record.curve(said)],
            },
            versions={name: version(name) for name in ("torch", "transformers", "tokenizers")},
        )

    def _groups(
        self, model: PreTrainedModel, structure: Structure, batches: Sequence[torch.Tensor], context: PassContext
    ) -> tuple[Groups, Sequence[int], dict[tuple[int, ...], float], Statistics | None]:
        """Return which layers share, at which ranks, by which damages, and what text was found to say."""
        from passes.loop import blocks, damage, grouping

        parameters = self.parameters
        grouping.check(parameters, structure)
        if parameters.chosen_pattern != "free":
            groups = grouping.regular(parameters, structure)
            return groups, (parameters.even_rank,) * len(groups), {}, None
        if parameters.aligns:
            damage.align_neighbours(model, structure, grouping.looped_layers(parameters, structure))
        rows = max(1, parameters.damage_samples // max(1, batches[0].shape[0]))
        damages = damage.measure(model, structure, batches[:rows], grouping.candidates(parameters, structure), context)
        known, layers = None, sorted({index for group in damages for index in group})
        if parameters.is_fitted and blocks.fits_at_once(structure, layers, model.device):
            known = blocks.observe(
                model, structure, layers, parameters, batches, seed=context.seed, progress=context.progress
            )
        left = damage.Remaining(model, structure, known)
        chosen = grouping.free(parameters, structure, lambda group, rank: damages[group] * left.share(group, rank))
        return tuple(option.layers for option in chosen), [option.rank for option in chosen], damages, known

    def _drawn(self, model: PreTrainedModel, context: PassContext) -> torch.Tensor | None:
        """Return text that is drawn from the model itself; None where none is asked for."""
        from passes.loop import own_text

        if not self.parameters.drawn:
            return None
        return own_text.draw(
            model, self.parameters.drawn, self.parameters.heal_length, getattr(context.tokenizer, "bos_token_id", None),
            context.work, seed=context.seed, progress=context.progress,
        )  # fmt: skip

    def _heal(
        self, model: PreTrainedModel, original: PreTrainedModel, drawn: torch.Tensor | None, context: PassContext
    ) -> Trained:
        """Distil the original into the looped model on the whole calibration text."""
        import torch

        from passes.loop import launched
        from passes.loop.heal import heal
        from passes.loop.training import Settings

        text, parameters = context.calibration, self.parameters
        ids = getattr(text, "ids", None)
        if ids is None:
            raise PassError("heal_tokens needs the whole calibration text; give a calibration text, or heal_tokens=0")
        settings = Settings(
            tokens=parameters.heal_tokens,
            length=parameters.heal_length,
            batch=parameters.heal_batch,
            micro_batch=max(1, calibration_text.BATCH_TOKENS // (2 * parameters.heal_length)),
            learning_rate=parameters.learning_rate,
            limit_seconds=None if parameters.heal_minutes is None else 60 * parameters.heal_minutes,
            checkpoint_seconds=60 * parameters.checkpoint_minutes,
            gradient_checkpointing=parameters.gradient_checkpointing,
            mixed=model.dtype.itemsize == 2,
        )
        if drawn is not None:
            ids = torch.cat([drawn, ids])  # held out are the last windows: of the text
        processes = parameters.heal_processes
        if processes is None:
            most = torch.cuda.device_count() if model.device.type == "cuda" else 1
            processes = max(count for count in range(1, most + 1) if settings.batch % count == 0)
        if processes > 1:
            return launched.heal(
                model, original, ids, settings, context.work,
                processes=processes, names=parameters.heal_train, label_weight=parameters.heal_labels,
                seed=context.seed, progress=context.progress,
            )  # fmt: skip
        return heal(
            model, original, ids, settings, context.work,
            names=parameters.heal_train, label_weight=parameters.heal_labels, seed=context.seed,
            progress=context.progress,
        )  # fmt: skip

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the looped model; its class puts the modelling file beside the weights."""
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)

    def check_files(self, folder: Path, model: PreTrainedModel) -> tuple[str, ...]:
        """Hold the checkpoint against its plan: every shared tensor once, bytes as planned."""
        from passes.loop.saved import check

        return check(folder, model)

    @classmethod
    def register_model(cls, folder: Path) -> None:
        """Make transformers know the looped classes of a checkpoint, from this package and not from its folder."""
        from passes.loop.known import register

        register(folder)

    def load(self, folder: Path, model: PreTrainedModel, options: LoadOptions) -> LoadRecord:
        """Say which blocks run several times; nothing else is to be done."""
        from passes.loop.layout import LoopPlan

        plan = LoopPlan.from_json(model.config.loop)
        notes = [f"{plan.layers} layers run with {plan.sets} sets of weights"]
        if model.config.loop.get("runtime") == "depth-batched":
            notes.append(
                "made to be served batched over depth: effcli.depth_batched(model, tokenizer).generate(prompts)"
            )
        return LoadRecord(notes=tuple(notes))

    def measure(self, model: PreTrainedModel, context: MeasureContext) -> Measured:
        """Measure whether a block's weights are moved again in each loop, and what depth-wise batching gains."""
        from passes.loop import runtime

        return runtime.measure(model, context, depth_batched=self.parameters.runtime == "depth-batched")
