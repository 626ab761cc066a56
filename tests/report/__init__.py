"""Figures, pages, comparisons and the dashboard."""
