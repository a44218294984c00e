"""`make istio`: Istio's own integration tests, with Istio's CNI plugin and with sidestep, compared case by case."""
