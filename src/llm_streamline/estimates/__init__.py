"""What a run or a plan will take, said before it is done."""
