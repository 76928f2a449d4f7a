"""Shared by ``cpu`` and ``gpu``. Only ``bits`` needs torch and only ``pictures`` needs matplotlib."""
