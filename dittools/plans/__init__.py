"""Plans: which method runs on which layer, head and step; built, checked, saved and loaded."""

from dittools.plans.plan import ModelFacts, Plan, Rule, Schedule

__all__ = ["ModelFacts", "Plan", "Rule", "Schedule"]
