"""Frameworks that always make a plain loader, taught to make this one. Nothing here is imported unless asked for.

Lightning, Fabric, ignite and Ray Train keep a loader's class and options, and need none of this: ``docs/guide/
frameworks.md`` says what to write for each.
"""
