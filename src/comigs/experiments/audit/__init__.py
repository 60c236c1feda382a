"""What an audit of a run's privacy found: figures from guesses, a bound from them, and a page."""
