// The loss of a training step, with or without a teacher, and the gradients of the head's own tensors, in fp32.
#pragma once
#include "kernels/cuda/adamw.h"

namespace pyra::kernels::cuda {

struct CrossEntropyCall {
  const float* logits = nullptr;    ///< [batch,classes]
  const int32_t* labels = nullptr;  ///< [batch], each within the classes
  float* d_logits = nullptr;        ///< [batch,classes]: (softmax - one hot) / batch
  StepStatus* status = nullptr;     ///< pending_loss: the mean; pending_correct: rows whose largest logit (the first of
                                    ///< equals) is the label's
  int batch = 0, classes = 0;
  /// With a teacher's logits [batch,classes] the loss is (1 - weight) cross-entropy + weight T² KL(teacher, student),
  /// both softened by the temperature T (Hinton et al., arXiv 1503.02531), and d_logits its gradient.
  const float* teacher = nullptr;
  float teacher_weight = 0, temperature = 1;
};
void cross_entropy(const CrossEntropyCall& call, cudaStream_t stream);

struct HeadGradientCall {
  const float* d_logits = nullptr;  ///< [batch,classes]
  const float* features = nullptr;  ///< [batch,channels]
  float* d_weight = nullptr;        ///< [classes,channels], or null
  float* d_bias = nullptr;          ///< [classes], or null
  int batch = 0, classes = 0, channels = 0;
};
/// d_weight = d_logitsᵀ features, d_bias = column sums; over images in their order.
void head_gradient(const HeadGradientCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
