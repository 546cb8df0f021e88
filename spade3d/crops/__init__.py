"""Crops: chance draws where to look, exact code cuts, matches places and selects who attracts whom."""
