"""scenefit."""
