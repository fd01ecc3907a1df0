"""Techniques that change a model: quantization, product-quantized KV cache, layer looping, cache schedules.

A pass may use :mod:`profilers`; it never imports :mod:`effcli`.
"""
