"""From rows to what people look at: tables, charts, pages."""
