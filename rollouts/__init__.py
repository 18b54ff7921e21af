"""What an evaluation needs: its plan, episodes in the simulator, results, conformance, films, filmstrips."""
