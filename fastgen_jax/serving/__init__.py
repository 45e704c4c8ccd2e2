"""The persistent server: OpenAI's HTTP interface for one or several engines."""
