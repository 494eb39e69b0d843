"""The interactive notebook: views of a run's rotations that follow a slider."""
