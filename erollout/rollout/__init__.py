"""One step's rollout on all replicas: dispatch, control, partial rollouts, comparison."""
