// The scans of the LSTM.
#include "launch.cuh"

int launch_lstm(const Arguments& p, const Launch& launch) {
    return launch_cell<Lstm>(p, launch);
}
