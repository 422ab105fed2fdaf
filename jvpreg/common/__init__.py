"""What every room uses: checks of arguments, dtypes, seeds, replicas, and the door to Keras' private parts."""
