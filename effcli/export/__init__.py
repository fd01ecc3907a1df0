"""``effcli export``: a model in another runtime's format, checked against torch before it is published."""
