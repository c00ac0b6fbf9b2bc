"""The theorems: bounds, certificates along a computed flow, and their verification on random problems."""
