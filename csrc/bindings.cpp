// The Python module: launches a scan on memory that Python has checked and allocated. It knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "arguments.h"

#ifdef FASTRNN_HOST_RUN
#include "primitives.cuh"
#endif

namespace py = pybind11;

namespace {

template <class T>
T* address(uint64_t value) {
    return reinterpret_cast<T*>(value);
}

int launch_any(const std::string& cell, const Arguments& p, const Launch& launch) {
    if (cell == "lstm") return launch_lstm(p, launch);
    if (cell == "gru") return launch_gru(p, launch);
    if (cell == "rnn_tanh" || cell == "rnn_relu") return launch_rnn(p, launch);
    throw std::invalid_argument("no such cell: " + cell);
}

// See Arguments and Launch; tensors are addresses, 0 where there is none.
void scan(const std::string& cell, int type, bool backward, bool spread, int tiles, int teams, uint64_t stream,
          uint64_t weights, uint64_t bias_hn, uint64_t gates_x, uint64_t offsets, uint64_t resets, uint64_t exchange,
          uint64_t initial, uint64_t hidden, uint64_t cell_state, uint64_t output, uint64_t gates, uint64_t hidden_prev,
          uint64_t cell_prev, uint64_t cells, uint64_t dgates, uint64_t failure, int groups, int batch, int steps,
          int size, int stride, uint32_t reverse, int period) {
    Arguments p = {};
    p.weights = address<void>(weights), p.bias_hn = address<void>(bias_hn), p.gates_x = address<void>(gates_x);
    p.offsets = address<int64_t>(offsets), p.resets = address<uint8_t>(resets);
    p.exchange = address<uint32_t>(exchange), p.initial = address<void>(initial);
    p.hidden = address<float>(hidden), p.cell = address<float>(cell_state);
    p.output = address<void>(output), p.gates = address<void>(gates);
    p.hidden_prev = address<void>(hidden_prev), p.cell_prev = address<void>(cell_prev);
    p.cells = address<void>(cells), p.dgates = address<void>(dgates), p.failure = address<uint32_t>(failure);
    p.groups = groups, p.batch = batch, p.steps = steps, p.size = size, p.stride = stride;
    p.reverse = reverse, p.period = period;
    p.variant.relu = cell == "rnn_relu";
    const Launch launch = {type, backward, spread, tiles, teams, stream, nullptr};
    const int error = launch_any(cell, p, launch);
    if (error != 0)
        throw std::runtime_error("the launch of " + cell + (backward ? " backward" : " forward") + ", regime " +
                                 (spread ? "L" : "S") + ", hidden size " + std::to_string(size) + ", batch " +
                                 std::to_string(batch) + ": " + describe_error(error));
}

// Blocks of a team (1 in regime S), threads and bytes of shared memory of a block; None where the regime cannot take
// the hidden size.
py::object grid(const std::string& cell, int type, bool backward, bool spread, int tiles, int size) {
    Arguments p = {};
    p.size = size, p.batch = p.groups = p.steps = 1;
    Grid grid = {};
    const Launch launch = {type, backward, spread, tiles, 1, 0, &grid};
    if (launch_any(cell, p, launch) != 0) return py::none();
    return py::make_tuple(grid.x, grid.threads, grid.shared_bytes);
}

uint64_t host_word() {
    uint32_t* word = nullptr;
    const int error = new_host_word(&word);
    if (error != 0)
        throw std::runtime_error(std::string("no host memory that a GPU may write: ") + describe_error(error));
    return reinterpret_cast<uint64_t>(word);
}

#ifdef FASTRNN_HOST_RUN
using WhileItRuns = py::call_guard<>;  // one grid at a time
#else
// A launch waits where too many are queued, and other threads go on meanwhile.
using WhileItRuns = py::call_guard<py::gil_scoped_release>;
#endif

}  // namespace

PYBIND11_MODULE(FASTRNN_MODULE, m) {
    m.doc() = "The scans of csrc/, for fastrnn.kernels.cuda_scan";
    m.def("scan", &scan, WhileItRuns(), py::kw_only(), py::arg("cell"), py::arg("type"), py::arg("backward"),
          py::arg("spread"), py::arg("tiles"), py::arg("teams"), py::arg("stream"), py::arg("weights"),
          py::arg("bias_hn"), py::arg("gates_x"), py::arg("offsets"), py::arg("resets"), py::arg("exchange"),
          py::arg("initial"), py::arg("hidden"), py::arg("cell_state"), py::arg("output"), py::arg("gates"),
          py::arg("hidden_prev"), py::arg("cell_prev"), py::arg("cells"), py::arg("dgates"), py::arg("failure"),
          py::arg("groups"), py::arg("batch"), py::arg("steps"), py::arg("size"), py::arg("stride"), py::arg("reverse"),
          py::arg("period"));
    m.def("grid", &grid, py::arg("cell"), py::arg("type"), py::arg("backward"), py::arg("spread"), py::arg("tiles"),
          py::arg("size"));
    m.def("host_word", &host_word);
#ifdef FASTRNN_HOST_RUN
    m.attr("HOST_RUN") = true;
    m.def(
        "set_schedule",
        [](uint32_t seed, int late_block, int dead_block, int dropped, uint64_t longest_wait) {
            host::settings = {seed, late_block, dead_block, dropped, longest_wait};
            host::flag_loads = 0;
        },
        py::kw_only(), py::arg("seed") = 0, py::arg("late_block") = -1, py::arg("dead_block") = -1,
        py::arg("dropped") = -1, py::arg("longest_wait") = host::Settings().longest_wait);
    // The places that order or wait, as far as launches have come to them: "file:line what".
    m.def("sites", [] {
        std::vector<std::string> names;
        for (const host::Site& site : host::sites) names.push_back(site.place + " " + site.what);
        return names;
    });
    m.def("flag_loads", [] { return host::flag_loads; });
#else
    m.attr("HOST_RUN") = false;
    // The fingerprint of the sources, the GPUs that have an image ("80 90"), and the one of the PTX: see cuda_build.py.
    m.attr("BUILT_OF") = FASTRNN_BUILT_OF;
    m.attr("IMAGES") = FASTRNN_IMAGES;
    m.attr("PTX") = FASTRNN_PTX;
#endif
}
