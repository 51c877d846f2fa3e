"""Nouns the recipes share: data, models, schedules, the launched world. No training loop lives here."""
