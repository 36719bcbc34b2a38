"""Better molecules near given leads: each lead by itself, within its scorer calls, no further than a similarity."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import Field

from gengrad.data.draws import generator_for
from gengrad.molecules.ledger import Ledger, Member, best
from gengrad.molecules.metrics import describe, describers, tanimoto
from gengrad.molecules.objective import load_objective
from gengrad.molecules.population import write_rows
from gengrad.molecules.prepare import standardise_rows
from gengrad.molecules.progress import Progress
from gengrad.molecules.proposers import Proposer
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.searching import IDLE, mating_pool, search_head, write_folder
from gengrad.registry import PROPOSERS, Settings
from gengrad.strict_yaml import ConfigError, check


class LeadSearch(Settings):
    """``alive``: of a lead's molecules that may be parents; ``offspring``: proposals of a round for each lead;
    ``keep``: of the best of each lead, in population_after.csv; ``decodes``: proposals for each scorer call at most;
    ``keep_scaffold``: molecules of another Murcko scaffold than the lead's are not scored."""

    alive: int = Field(20, ge=1)
    offspring: int = Field(40, ge=1)
    keep: int = Field(1, ge=1)
    decodes: int = Field(50, ge=1)
    keep_scaffold: bool = False


@dataclass
class Lead:
    """One lead with what was found near it: SMILES -> (member, similarity to the lead), itself among them."""

    row: Row
    smiles: str | None
    problem: str = ""
    found: dict[str, tuple[Member, float]] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=lambda: {"proposed": 0, "valid": 0, "similar": 0, "new": 0})
    idle: int = 0

    @property
    def member(self) -> Member:
        return self.found[self.smiles][0]

    def best(self, k: int, per_scaffold: int | None) -> list[Member]:
        """Its k best passing molecules other than itself."""
        others = [m for m, _ in self.found.values() if m.passed and m.smiles != self.smiles]
        return best(others, k, per_scaffold)

    def gain(self) -> float | None:
        """Total of the best molecule minus the lead's; None where nothing near it passes."""
        top = self.best(1, None)
        return top[0].total - self.member.total if top and self.member.total == self.member.total else None


def run_leads(
    leads_file: str | Path,
    objective_file: str | Path,
    similarity: float,
    calls: int,
    out: str | Path,
    *,
    proposer: dict | None = None,
    column: str | None = None,
    seed: int = 0,
    processes: int = 1,
    timeout: float = 10.0,
    settings: LeadSearch | None = None,
) -> dict:
    """At most ``calls`` scorer calls for each lead, itself included, on molecules of Tanimoto >= ``similarity`` to it.

    Writes leads.csv (one line for each row of the file) beside the files of ``run_baseline``; returns run.json. What
    is found for a lead depends on no other lead. Raises ``ValueError`` for a similarity outside [0, 1), a budget below
    2, an unknown proposer, or a file without a molecule.
    """
    settings, out = settings or LeadSearch(), Path(out)
    if not 0 <= similarity < 1:
        raise ValueError(f"--similarity {similarity:g}: give a Tanimoto similarity from 0 to below 1, e.g. 0.4")
    if calls < 2:
        raise ValueError(f"--calls {calls}: the lead itself takes one scorer call; give at least 2")
    chosen = {"name": "graph"} if proposer is None else proposer
    source = _proposer(chosen)
    objective = load_objective(objective_file)
    leads = _leads(leads_file, column, processes, timeout)
    good = [lead for lead in leads if lead.smiles is not None]
    head = search_head("optimize", objective_file, leads_file, seed)
    head |= {
        "proposer": chosen,
        "proposer_digest": source.digest(),
        "similarity": similarity,
        "calls_per_lead": calls,
        **settings.model_dump(),
    }
    ledger = Ledger(objective, calls * len(good), out / "calls.jsonl", head)
    progress, began = Progress(ledger), time.monotonic()
    with (
        source.ready(processes, timeout, objective),  # first: what it reads may be wrong
        ledger.open(processes, timeout),
        describers((), processes, timeout) as workers,
    ):
        _enter_leads(ledger, progress, good)
        rounds = 0
        while active := [lead for lead in good if _goes_on(lead, calls, settings)]:
            rounds += 1
            for lead in active:
                generator = generator_for(seed, "leads", leads.index(lead), rounds)
                _one_round(ledger, progress, lead, source, generator, similarity, calls, rounds, settings, workers)
            progress.note(rounds, **_summary(good))
    limit = objective.settings.per_scaffold
    after = [replace(m, parent=lead.member.id) for lead in good for m in lead.best(settings.keep, limit)]
    before = list({lead.member.id: lead.member for lead in good}.values())
    write_rows(out / "leads.csv", [_row(lead) for lead in leads])
    spent = {key: sum(lead.spent[key] for lead in good) for key in ("proposed", "valid", "similar", "new")}
    progress.spent = spent
    found = {**head, "calls": len(ledger.members), "leads": len(leads), "valid_leads": len(good), **_summary(good)}
    found |= {"resumed_after": ledger.resumed, "ended": "budget spent" if _all_spent(good, calls) else "no way on"}
    return write_folder(out, objective_file, ledger, progress, before, after, found, time.monotonic() - began)


def _proposer(chosen: dict) -> Proposer:
    """The proposer of a mapping with a ``name``; every mistake in its settings is told at once."""
    cls, problems = PROPOSERS.get(chosen.get("name")), []
    rest = {key: value for key, value in chosen.items() if key != "name"}
    settings = check(cls.Config, rest, f"proposer {cls.name}", list(cls.Config.model_fields), problems)
    if problems:
        raise ConfigError("; ".join(f"{key}: {text}" for key, text in problems))
    return cls(settings)


def _leads(path, column: str | None, processes: int, timeout: float) -> list[Lead]:
    """Every row of the file; those that are no molecule carry the reason."""
    rows = read_molecules(path, column).rows
    results = standardise_rows(rows, None, processes, timeout)
    bad = [isinstance(result, ValueError) for result in results]
    if all(bad):
        raise ValueError(f"{path}: none of {len(rows)} rows is a molecule; `gengrad molecules prepare` says why")
    return [Lead(row, None, str(r)) if b else Lead(row, r[0]) for row, r, b in zip(rows, results, bad)]


def _enter_leads(ledger: Ledger, progress: Progress, leads: Sequence[Lead]) -> None:
    ledger.score([lead.smiles for lead in leads], [None] * len(leads), 0)
    for lead in leads:
        lead.found[lead.smiles] = (ledger.of(lead.smiles), 1.0)
    progress.note(0, **_summary(leads))


def _goes_on(lead: Lead, calls: int, settings: LeadSearch) -> bool:
    """Whether a lead has calls left, proposals left, and found something new of late."""
    few = lead.spent["proposed"] < settings.decodes * calls
    return len(lead.found) < calls and few and lead.idle < IDLE


def _one_round(ledger, progress, lead: Lead, source: Proposer, generator, similarity, calls, step, settings, workers):
    """Proposals from the lead's best so far; the first that are near enough and new to it are scored."""
    members = [member for member, _ in lead.found.values()]
    alive = best(members, settings.alive, ledger.objective.settings.per_scaffold) or [lead.member]
    pool = [member.smiles for member in mating_pool(alive, settings.offspring, generator)]
    proposals = [p.smiles for p in source.propose(pool, settings.offspring, generator) if p.smiles]
    seen = describe([lead.smiles, *proposals], (), workers=workers)
    near = [round(x, 6) for x in tanimoto(seen.fingerprints[:1], seen.fingerprints)[0].tolist()]  # 0.7 is not below 0.7
    kept = [not settings.keep_scaffold or one == seen.scaffolds[0] for one in seen.scaffolds.tolist()]
    near = [value if keeps else -1.0 for value, keeps in zip(near, kept)]
    valid = dict(zip(seen.smiles[1:], near[1:]))
    similar = {text: value for text, value in valid.items() if value >= similarity}
    new = {text: value for text, value in similar.items() if text not in lead.found}
    counts = (settings.offspring, len(seen.smiles) - 1, sum(valid[t] >= similarity for t in seen.smiles[1:]), len(new))
    for name, count in zip(lead.spent, counts):
        lead.spent[name] += count
    progress.spend(**dict(zip(lead.spent, counts)))
    lead.idle = 0 if new else lead.idle + 1
    chosen = list(new)[: calls - len(lead.found)]
    ledger.score(chosen, [lead.member.id] * len(chosen), step)
    lead.found |= {text: (ledger.of(text), new[text]) for text in chosen}


def _all_spent(leads: Sequence[Lead], calls: int) -> bool:
    return all(len(lead.found) == calls for lead in leads)


def _summary(leads: Sequence[Lead]) -> dict:
    """Over the leads that are molecules: the share improved, and the mean gain, a lead without one counting as 0."""
    gains = [lead.gain() for lead in leads]
    better = [gain for gain in gains if gain is not None and gain > 0]
    return {"success_rate": len(better) / len(leads), "mean_gain": sum(better) / len(leads)}


def _row(lead: Lead) -> dict:
    """A lead's line in leads.csv."""
    start = {"id": lead.row.name, "row": lead.row.number, "input": lead.row.shown, "smiles": lead.smiles}
    top = lead.best(1, None) if lead.smiles else []
    gain = lead.gain() if lead.smiles else None
    near = [value for m, value in lead.found.values() if top and m.smiles == top[0].smiles]
    return {
        **start,
        "total": lead.member.total if lead.smiles else None,
        "best_smiles": top[0].smiles if top else None,
        "best_total": top[0].total if top else None,
        "gain": gain,
        "similarity": near[0] if near else None,
        "improved": None if lead.smiles is None else int(gain is not None and gain > 0),
        "calls": len(lead.found),
        **lead.spent,
        "notes": lead.problem,
    }
