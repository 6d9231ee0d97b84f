"""What training did, and which method for which task: analyses of trained parameters, and their figures."""
