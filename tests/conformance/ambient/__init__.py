"""The comparison with Istio's ambient rules, built of the parts of that for sidecars."""
