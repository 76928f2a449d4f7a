"""Roles of the layers in modules of torch.nn and of model libraries, by the names of types and attributes."""
