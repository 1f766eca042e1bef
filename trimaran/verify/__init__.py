"""``trimaran verify URL``: whether a deployed server does what it promises.

Reads in this order: ``target`` (how it is asked), ``checks`` (their order), ``answers``, ``manners``, ``realtime``,
``load`` and ``redeploy`` (the checks), ``reference`` (what its greedy tokens should be), ``report``, ``command``.
"""
