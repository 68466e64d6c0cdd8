"""Adapters to serving engines; dittools has no server of its own."""
