"""Hours of bad luck in minutes: a server under load whose clients, manager, disk and threads misbehave."""
