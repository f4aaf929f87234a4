"""What happens inside a network: captured features, redundancy, gates and their ablation, attribution.

Import the modules that you need; only `attribution` needs Captum.
"""
