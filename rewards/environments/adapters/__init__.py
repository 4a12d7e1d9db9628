"""Environments of other packages: `mcp` (tools of MCP servers), `openenv`, `skyrl_gym`.

Each module imports its package when it is loaded, so this one imports none of them.
"""
