"""What a plan costs layer by layer: its groups of heads followed through the steps of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dittools.errors import PlanError
from dittools.grid import TokenGrid
from dittools.methods import GridMethod, Method
from dittools.plans import Plan
from dittools.plans.phrase import phrase
from dittools.plans.plan import HeadRule
from dittools.reading import misfit
from dittools.searching.cost import DEFAULT_BLOCK, CostTable


@dataclass(frozen=True)
class Load:
    """What a model does in one generation.

    Attributes:
        grid: geometry of the main attention.
        layers, heads, head_dim, steps: of the run.
        attention_share: part of the time (or FLOPs) in attention a plan can act on.
        seconds: of a dense generation; 0 when only FLOPs are known.
        paths: module path of every layer, "" where not known.
    """

    grid: TokenGrid
    layers: int
    heads: int
    head_dim: int
    steps: int
    attention_share: float
    seconds: float = 0.0
    paths: tuple[str, ...] = ()

    def path(self, layer: int) -> str:
        """Return the module path of a layer, "" where not known."""
        return self.paths[layer] if layer < len(self.paths) else ""


Place = tuple[int, int, tuple[int, ...], str]  # part of a run, layer, heads, method as a phrase


@dataclass
class Seen:
    """What methods that look at query and key kept in a short run of the model.

    Attributes:
        parts: steps of that run; each stands for an equal part of a whole one.
        shares: place -> density and share of blocks visited, once per call.
    """

    parts: int
    shares: dict[Place, list[tuple[float, float]]] = field(default_factory=dict)

    def part(self, step: int, steps: int) -> int:
        """Return the step of the short run that stands for one of a whole run."""
        return step * self.parts // steps

    def note(self, at: Place, share: tuple[float, float]) -> None:
        """Add what one call kept."""
        self.shares.setdefault(at, []).append(share)

    def share(self, at: Place) -> tuple[float, float] | None:
        """Return the mean density and share of blocks; None where nothing was seen."""
        found = self.shares.get(at)
        if not found:
            return None
        density, computed = (sum(column) / len(found) for column in zip(*found, strict=True))
        return density, computed


@dataclass(frozen=True)
class Price:
    """Means over calls.

    Attributes:
        density: share of pairs.
        computed: share of blocks visited.
        time: as a share of a dense call.
    """

    density: float
    computed: float
    time: float


def sides_of(plan: Plan) -> tuple[str, ...]:
    """Return the guidance branches whose rules differ; one without a name where they do not."""
    return ("cond", "uncond") if plan.needs_branch else ("",)


class Pricer:
    """Prices layers of one plan on one model; masks are looked at once per method."""

    def __init__(
        self, load: Load, plan: Plan, costs: CostTable, may_decline: bool, seen: Seen | None = None
    ) -> None:
        """Start with nothing unknown.

        Args:
            load: what the model does.
            plan: to price.
            costs: kernel times and groups.
            may_decline: the backend runs dense by itself where that is faster, as "auto" does.
            seen: what methods kept in a short run; None goes by what they are asked for.
        Raises:
            PlanError: the densities measured for the plan are malformed.
        """
        self.load, self.plan, self.costs, self.may_decline = load, plan, costs, may_decline
        self.seen, self._measured = seen, _densities(plan)
        self.unknown: dict[str, None] = {}
        self._shares: dict[int, tuple[float, float]] = {}  # by id: the plan keeps them alive
        self._phrases: dict[int, str] = {}
        if costs.basis == "measured" and costs.tokens != load.grid.total:
            words = f"kernel times are those of {costs.tokens} tokens, not {load.grid.total}"
            self.unknown[words] = None

    def layer(self, layer: int) -> Price:
        """Return what one layer costs over the whole run."""
        found = [self._side(layer, side) for side in sides_of(self.plan)]
        density, computed, time = (
            sum(getattr(price, name) for price in found) / len(found)
            for name in ("density", "computed", "time")
        )
        return Price(density, computed, time)

    def _side(self, layer: int, side: str) -> Price:
        load = self.load
        density = computed = time = 0.0
        begun: set[tuple[tuple[int, ...], str, bool]] = set()
        for step in range(load.steps):
            rules = self.plan.rules_for(layer, load.path(layer), step, load.steps, load.heads, side)
            if all(method.name == "dense" for _, method in rules):
                density, computed, time = density + 1, computed + 1, time + 1
                continue
            time += self.costs.check_ratio + (len(rules) > 1) * self.costs.split_ratio
            for rule in rules:
                state = self._state(begun, rule, step)
                price = self._group(layer, rule, step, state)
                share = len(rule[0]) / load.heads
                density += share * price.density
                computed += share * price.computed
                time += price.time
        return Price(density / load.steps, computed / load.steps, time / load.steps)

    def _state(
        self, begun: set[tuple[tuple[int, ...], str, bool]], rule: HeadRule, step: int
    ) -> str:
        """Return where in a run a group stands; methods remember by heads and parameters."""
        group = rule[0], self._phrase(rule[1])
        late = 2 * step >= self.load.steps
        is_first = (*group, False) not in begun
        is_turn = late and (*group, True) not in begun
        begun |= {(*group, False), (*group, late)}
        if is_first:
            return "first"
        return "turn" if is_turn else "late" if late else "later"

    def _group(self, layer: int, rule: HeadRule, step: int, state: str) -> Price:
        """Return the price of one group at one step, its time next to a dense call of all heads."""
        heads, method = rule
        share = len(heads) / self.load.heads
        mode = getattr(method, "mode", "")
        if method.name == "dense" or mode == "full":
            return Price(1.0, 1.0, share)
        if mode == "skip":
            return Price(0.0, 0.0, 0.0)
        density, computed = self._kept(layer, rule, step)
        timed = self.costs.group(method, len(heads), {state: 1.0}, computed)
        if timed is None:
            block = int(getattr(method, "block_size", DEFAULT_BLOCK))
            kernel = share * (self.costs.ratio(computed, block) if density < 1 else 1.0)
            timed = (0.0, kernel)
            if not is_fixed(method):
                self._lacks_choosing(method)
        choosing, kernel = timed
        if self.may_decline:
            kernel = min(kernel, share)
        return Price(density, computed, choosing + kernel)

    def _lacks_choosing(self, method: Method) -> None:
        if self.costs.basis == "flops":
            self.unknown["only FLOPs are counted: choosing is taken to cost nothing"] = None
        else:
            self.unknown[f"what {method.name} takes to choose was not timed"] = None

    def _kept(self, layer: int, rule: HeadRule, step: int) -> tuple[float, float]:
        """Return density and computed share of a group."""
        heads, method = rule
        if self.seen is not None and not is_fixed(method):
            part = self.seen.part(step, self.load.steps)
            found = self.seen.share((part, layer, heads, self._phrase(method)))
            if found is not None:
                return found
        if id(method) not in self._shares:
            self._shares[id(method)] = self._share(method)
        return self._shares[id(method)]

    def _phrase(self, method: Method) -> str:
        if id(method) not in self._phrases:
            self._phrases[id(method)] = phrase(method)
        return self._phrases[id(method)]

    def _share(self, method: Method) -> tuple[float, float]:
        """Return density and computed share of a method: by its mask, what a search measured, or
        the density it is asked for.
        """
        if is_fixed(method):
            mask = method.mask(self.load.grid)  # type: ignore[attr-defined]
            return mask.density, mask.computed
        known = self._measured.get(phrase(method))
        if known is not None:
            return known
        nominal = getattr(method, "density", None)
        density = float(nominal) if isinstance(nominal, float) else 1.0
        self.unknown[f"{method.name} chooses in the run ({density:.2f} assumed)"] = None
        return density, density


def _densities(plan: Plan) -> dict[str, tuple[float, float]]:
    """Return density and share of blocks by method, as a search wrote them into a plan.

    Either may exceed 1: pooled keys and exact rows count too.
    """
    given = plan.measured.get("densities", {})
    wrong = misfit(given, {"*": [float]}, "densities")
    if not wrong:
        bad = [n for n, v in given.items() if len(v) != 2 or not 0 <= min(v) <= max(v) <= 4]
        wrong = f"{given[bad[0]]} for {bad[0]}" if bad else ""
    if wrong:
        raise PlanError(
            "what the plan says was measured is malformed",
            expected="densities: a density and a share of blocks for each method",
            got=wrong,
            remedy="the plan as the search wrote it, or without `measured`",
        )
    return {name: (float(pair[0]), float(pair[1])) for name, pair in given.items()}


def is_fixed(method: Method) -> bool:
    """Whether a method's mask depends on the grid alone."""
    mode = getattr(method, "mode", "")
    return isinstance(method, GridMethod) and isinstance(mode, str) and mode != "auto"


def state_shares(steps: Sequence[int], total: int) -> dict[str, float]:
    """Return the share of calls in each state for a group that runs at these steps of a run."""
    found: dict[str, float] = {}
    turned = False
    for place, step in enumerate(steps):
        late = 2 * step >= total
        state = "first" if place == 0 else "later" if not late else "late" if turned else "turn"
        turned = turned or late
        found[state] = found.get(state, 0.0) + 1 / len(steps)
    return found
