"""What a run's data say: statistics, tables, verdicts, figures and the report. No algorithm in it."""

from diffmbrl.report.report import health_text, learn_text, plan_text, rebuild, summarise, sweep_text

__all__ = ["health_text", "learn_text", "plan_text", "rebuild", "summarise", "sweep_text"]
