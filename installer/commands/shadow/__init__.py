"""`sidestep shadow`: whether sidestep decides as Istio's rules do."""
