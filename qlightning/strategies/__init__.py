"""Strategies: how a converted model is spread over processes."""
