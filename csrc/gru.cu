// The scans of the GRU.
#include "launch.cuh"

int launch_gru(const Arguments& p, const Launch& launch) {
    return launch_cell<Gru>(p, launch);
}
