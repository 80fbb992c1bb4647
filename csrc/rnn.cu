// The scans of the RNN.
#include "launch.cuh"

int launch_rnn(const Arguments& p, const Launch& launch) {
    return launch_cell<Rnn>(p, launch);
}
