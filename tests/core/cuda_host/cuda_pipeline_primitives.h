// Stands in for CUDA's header of this name where a kernel is compiled for the CPU: run.cpp has everything.
