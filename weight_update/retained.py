"""What a trainer rank keeps from one push to the next: the plan while the model's tensors stay where they are, tables
of it, and the bytes of the last confirmed push.

    plan = retained.plan(manifest, wish, places)
    scales = retained.scales(plan)
    content = retained.whole(plan, scales)        # or retained.compared(plan, scales), retained.whole_of(changes)

Where the rows are on a CUDA device, so is what is made of them (`forms`), and all of it goes by tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from quant.formats import NON_FINITE
from quant.names import NameMap

from .adapters import Adapted
from .base import Base, Changes, Whole, compare
from .comparing import Comparisons
from .confirmed import Confirmed
from .device_base import FormBase, FormChanges, FormWhole, as_base, compare_forms, fits
from .encoder import Grouping, Scales, largest_bits_of, nonfinite_index
from .errors import ManifestError, raise_all
from .filling import Form
from .forms import FormPlan, alike, plan_form
from .inplace import local_of
from .manifest import Manifest
from .ranks import Ranks
from .sharing import Holding, Shared, holding_of, plan_of, share_out
from .source import PushPlan, check_finite, named_items, offer_of
from .wishes import DIFFERENT_MAPS, Places, Wish

HOST = torch.device("cpu")
Keep = torch.device | Literal["auto"] | None


class Retained:
    """keep: device of the bytes of the last confirmed push, None for nowhere; "auto": where they were made. confirmed:
    that push."""

    def __init__(self, ranks: Ranks, names: NameMap, keep: Keep, confirmed: Confirmed) -> None:
        self._ranks, self._names, self._keep, self._confirmed = ranks, names, keep, confirmed
        self._shared: tuple[tuple[object, ...], Shared] | None = None  # by manifest and all ranks' holdings
        self._planned: _Planned | None = None
        self._tables: tuple[PushPlan, Grouping, FormPlan | None] | None = None
        self._looked: torch.Tensor | None = None  # largest magnitudes that are being looked for, of these tables
        self._form: Form | None = None
        self._comparisons: Comparisons | None = None  # of that form

    # -- the plan

    def plan(self, manifest: Manifest, wish: Wish, places: Places) -> PushPlan:
        """Who of the trainer's ranks sends what; the last plan again where every tensor is where it was, and every
        expert is to lie where it did."""
        ranks, scope, given = self._ranks, wish.scope, named_items(wish.model)
        asked = scope if isinstance(scope, str) else tuple(scope)
        here = [local_of(tensor) for _, tensor in given.items]
        which = (manifest.fingerprint, asked, places.maps, places.moved, given.trainable, *_where(given, here))
        planned = self._planned if self._planned is not None and self._planned.which == which else None
        self._looked = None if planned is None else self._look(planned.plan)  # on the device, while the host goes on
        shapes = _shapes(here)
        if all(ranks.gather(planned is not None and planned.shapes == shapes and not places.problems)):
            assert planned is not None
            return planned.plan
        self._looked = None
        offer = offer_of(manifest, given, scope, names=self._names, experts=places.maps)
        shared = self._share_out(manifest, holding_of(manifest, offer, ranks.rank))
        plan, problems = plan_of(manifest, offer, shared, ranks.rank, scope, places.moved)
        said = ranks.gather(([*places.problems, *offer.problems, *problems], places.maps))
        everywhere = list(dict.fromkeys(problem for each, _ in said for problem in each))
        everywhere += [DIFFERENT_MAPS] if any(maps != places.maps for _, maps in said) else []
        raise_all(ManifestError, "push refused", everywhere)
        assert plan is not None
        lasts = offer.is_lasting and not given.has_adapters
        self._planned = _Planned(which=which, shapes=shapes, given=given, plan=plan) if lasts else None
        return plan

    def _look(self, plan: PushPlan) -> torch.Tensor | None:
        """Begin to look for the largest magnitudes of what was planned before, where its rows are on a GPU. Their
        memory is there, for the same tensors have it."""
        form = self._tables[2] if self._tables is not None and self._tables[0] is plan else None
        return None if form is None else form.look()

    def _share_out(self, manifest: Manifest, own: Holding) -> Shared:
        """Who sends what; the ranks tell each other what they hold once, and again when that changes on one of them."""
        key = (manifest.fingerprint, *self._ranks.gather(own.digest))
        if self._shared is None or self._shared[0] != key:
            self._shared = key, share_out(manifest, self._ranks.gather(own), own)
        return self._shared[1]

    def _tables_of(self, plan: PushPlan) -> tuple[Grouping, FormPlan | None]:
        if self._tables is None or self._tables[0] is not plan:
            self._tables = plan, Grouping(plan), plan_form(plan)
        return self._tables[1:]

    def scales(self, plan: PushPlan) -> Scales:
        """The global scale of every source to encode: one amax a fused group, over all trainer ranks. Refuses NaN and
        Inf."""
        grouping, form = self._tables_of(plan)
        looked, self._looked = self._looked, None
        if form is None:
            own = largest_bits_of(plan.sources, plan.columns.small)
        else:
            own = form.largest_bits(form.look() if looked is None else looked)
        found = [plan.sources[i] for i in np.flatnonzero(own >= NON_FINITE)]
        where = {source.name: nonfinite_index(source) for source in found}
        bits = self._ranks.reduce(grouping.largest(own), dist.ReduceOp.MAX)
        check_finite(plan, bits, where)
        return grouping.scales(bits)

    # -- the bytes

    def whole(self, plan: PushPlan, scales: Scales) -> Whole:
        """Every row."""
        form = self._form_of(plan)
        if form is None:
            return Whole(plan, scales, keep=self._kept_on(HOST))
        base = self._confirmed.base
        if base is not None and _lies_in(base, form):  # where this push is encoded
            self._confirmed.forget()
        return FormWhole(form, scales.of_sources, keep=self._kept_on(form.plan.device))

    def compared(self, plan: PushPlan, scales: Scales) -> Changes | FormChanges:
        """What is not as in the base, which there is."""
        form, base = self._form_of(plan), self._confirmed.base
        if form is not None and isinstance(base, FormBase) and fits(form, base):
            return compare_forms(self._comparisons_of(form), scales.of_sources, base)
        assert base is not None
        self._confirmed.base = as_base(base)
        return compare(plan, scales, self._confirmed.base)

    def whole_of(self, changes: Changes | FormChanges) -> Whole:
        """The same push in full; the base becomes what it sends, so that no second copy of the weights is made."""
        self._confirmed.forget()
        made_on = changes.form.plan.device if isinstance(changes, FormChanges) else HOST
        return changes.whole(self._kept_on(made_on))

    def _kept_on(self, made_on: torch.device) -> torch.device | None:
        """Where bytes stay that were made on this device: a GPU holds that much memory anyway, for the next ones."""
        return made_on if self._keep == "auto" else self._keep

    def _form_of(self, plan: PushPlan) -> Form | None:
        """Its memory serves every push of the same rows, wherever the trainer has them; what a push of others needs is
        taken anew, and what a base lies in stays the base's."""
        planned, before = self._tables_of(plan)[1], self._form
        if planned is None or (before is not None and before.plan is planned):
            return None if planned is None else before
        self._form = self._comparisons = None  # freed first, unless a base lies there
        memory = before.memory if before is not None and alike(before.plan, planned) else None
        before = None
        self._form = Form(planned, memory)
        return self._form

    def _comparisons_of(self, form: Form) -> Comparisons:
        if self._comparisons is None or self._comparisons.form is not form:
            self._comparisons = Comparisons(form)
        return self._comparisons


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Planned:
    """A plan and what it was made of, which must live on: which tensors, their shapes, and they themselves."""

    which: tuple[object, ...]
    shapes: tuple[list[object], ...]
    given: Adapted
    plan: PushPlan


def _lies_in(base: Base | FormBase, form: Form) -> bool:
    """Whether bytes of a base are in the memory of a form."""
    if isinstance(base, FormBase):
        return base.memory is form.memory
    ours = form.memory.untyped_storage().data_ptr()
    return any(each.rows.untyped_storage().data_ptr() == ours for parts in base.held.values() for each in parts)


def _where(given: Adapted, here: Sequence[torch.Tensor]) -> tuple[list[object], ...]:
    """Each tensor, and where its rows lie: lists, since a tuple a tensor takes twice the time."""
    return (
        [name for name, _ in given.items],
        [id(tensor) for _, tensor in given.items],
        [x.data_ptr() for x in here],
    )


def _shapes(here: Sequence[torch.Tensor]) -> tuple[list[object], ...]:
    """And how: in equal memory rows may be others."""
    return [x.shape for x in here], [x.stride() for x in here], [x.dtype for x in here]
