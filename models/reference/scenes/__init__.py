"""Scenes: procedural pictures of everyday objects, with questions whose answers follow from the scene graph."""
