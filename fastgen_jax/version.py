"""The version of this package, for modules that must not import the whole package."""

VERSION = "0.1.0"
