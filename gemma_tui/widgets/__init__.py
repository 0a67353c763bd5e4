"""Widgets that draw: charts, forms, lists. They know Textual and no engine."""
