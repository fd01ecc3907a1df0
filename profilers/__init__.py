"""Instruments: each measures a model and returns a frozen dataclass of plain numbers in SI base units.

Nothing in this package prints, formats or reads the command line, and none of it changes a model for good.
Importing it does no work; import an instrument's own module, for example :mod:`profilers.sinks`.
"""
