"""Mixture-of-experts layers: route, dispatch, experts, combine."""
