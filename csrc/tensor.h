// A Python tensor as its memory, sizes and dtype, through DLPack's C exchange (version 1): the layout of the
// structs below is its ABI, and torch.Tensor hands out the table. So neither torch's headers nor its
// libraries are needed, and a read costs some ten nanoseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "dtypes.h"

namespace gas {

struct TensorView {
    void* data;
    std::int32_t device_type;  // kCpu, kCuda, or what no kernel here serves
    std::int32_t device;
    std::int32_t dims;
    std::uint8_t type_code;
    std::uint8_t bits;
    std::uint16_t lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;

    static constexpr std::int32_t kCpu = 1, kCuda = 2;

    void* address() const { return static_cast<char*>(data) + byte_offset; }

    std::int64_t numel() const {
        std::int64_t n = 1;
        for (int d = 0; d < dims; ++d) n *= shape[d];
        return n;
    }

    bool contiguous() const {
        std::int64_t step = 1;
        for (int d = dims - 1; d >= 0; step *= shape[d--]) {
            if (shape[d] == 0) return true;
            if (shape[d] != 1 && strides[d] != step) return false;
        }
        return true;
    }

    // Whether it is of one of the four storage types, and of which.
    bool stores(DType& dtype) const {
        constexpr int kFloat = 2, kBfloat = 4;
        if (lanes != 1 || (type_code != kFloat && !(type_code == kBfloat && bits == 16))) return false;
        dtype = type_code == kBfloat ? DType::bf16
                : bits == 64         ? DType::f64
                : bits == 32         ? DType::f32
                                     : DType::f16;
        return bits >= 16;
    }

    bool like(const TensorView& other) const {
        return device_type == other.device_type && device == other.device && dims == other.dims &&
               type_code == other.type_code && bits == other.bits && lanes == other.lanes &&
               std::equal(shape, shape + dims, other.shape);
    }
};

// What torch says of tensors: set once, when the package is imported.
class Tensors {
  public:
    static void bind(pybind11::type tensor, pybind11::type parameter) {
        struct Exchange {
            std::uint32_t major, minor;
            const Exchange* previous;
            void *allocate, *take, *give;
            int (*view)(void* tensor, TensorView* view);
            void* stream;
        };
        const pybind11::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        const auto* table =
            static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (table == nullptr) throw pybind11::error_already_set();
        while (table != nullptr && table->major != 1) table = table->previous;
        if (table == nullptr || table->view == nullptr)
            throw pybind11::import_error("this torch does not speak version 1 of DLPack's C exchange");
        // Both types live as long as the process.
        view_ = table->view, tensor_ = tensor.release().ptr(), parameter_ = parameter.release().ptr();
        requires_grad_ = PyUnicode_InternFromString("requires_grad"),
        is_neg_ = PyUnicode_InternFromString("is_neg");
    }

    // Without a message where the tensor has no memory: batched, sparse or fake ones.
    static bool view(PyObject* tensor, TensorView& view) {
        if (view_(tensor, &view) == 0) return true;
        PyErr_Clear();
        return false;
    }

    static bool is_tensor(PyObject* value) {
        return PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(tensor_));
    }

    // Whether the tensor is its memory, where kernels reach it: no subclass, no pending negation. `wanted`
    // becomes true if it requires a gradient.
    static bool plain(PyObject* value, TensorView& view, bool& wanted) {
        const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
        if ((type != tensor_ && type != parameter_) || !Tensors::view(value, view)) return false;
#ifdef GAS_ENGINE_WITH_CUDA
        if (view.device_type != TensorView::kCpu && view.device_type != TensorView::kCuda) return false;
#else
        if (view.device_type != TensorView::kCpu) return false;
#endif
        if (!wanted) wanted = truth(PyObject_GetAttr(value, requires_grad_));
        // A pending negation is a view of every second number: contiguous only if it is one.
        return (view.contiguous() && view.numel() != 1) || !truth(PyObject_CallMethodNoArgs(value, is_neg_));
    }

  private:
    static bool truth(PyObject* answer) {
        if (answer == nullptr) throw pybind11::error_already_set();
        Py_DECREF(answer);  // True and False live on
        return answer == Py_True;
    }

    static inline int (*view_)(void*, TensorView*) = nullptr;
    static inline PyObject *tensor_ = nullptr, *parameter_ = nullptr, *requires_grad_ = nullptr,
                           *is_neg_ = nullptr;
};

}  // namespace gas
