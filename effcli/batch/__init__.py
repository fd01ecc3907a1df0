"""``effcli batch``: models × recipes × devices, on one machine or on a Ray cluster, resumable, one summary."""
